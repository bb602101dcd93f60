"""Times of the evaluation's parts, each beside a target.

    python -m unic_ds.harness.bench                      all parts
    python -m unic_ds.harness.bench --only knn           one of them
    python -m unic_ds.harness.bench --scale 0.1          a tenth of the rows and images
    python -m unic_ds.harness.bench --json bench.json

Parts that are compared take turns, so that other load on the machine affects both; ratios are
medians over rounds. The targets are for the full scale.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config, data, demo, dist
from unic_ds.data.bench import machine
from unic_ds.data.bench_loaders import make_photographs
from unic_ds.evaluate import registry
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.extraction import extract
from unic_ds.evaluate.features import FeatureSet, Model, ModelOutput, Outputs
from unic_ds.evaluate.heads import Schedule
from unic_ds.evaluate.knn import Rows, knn_accuracies
from unic_ds.evaluate.linear_optuna import TRIALS, fit_optuna
from unic_ds.evaluate.linear_sgd import Trial
from unic_ds.evaluate.probe import Split, unit_length
from unic_ds.evaluate.products import product
from unic_ds.harness.image_sets import SampledImages
from unic_ds.models.student import Student

HAS_FAISS = find_spec("faiss") is not None
if HAS_FAISS:
    import faiss

TINY, TINY_SIDE = "vit_tiny_patch16_224", 112
BASE, BASE_SIDE = "vit_base_patch16_224", 224
IMAGES = 2000


@dataclass(frozen=True)
class Sizes:
    """Scale and settings of a run of the benchmark."""

    scale: float
    rounds: int
    device: torch.device
    images: str
    """Folder of images; empty: those of the demonstration, or generated photographs."""

    def __call__(self, full: int, least: int = 1) -> int:
        """A scaled number of rows, images or steps."""
        return max(least, round(full * self.scale))


@dataclass(frozen=True)
class Figure:
    """A measured figure and its target."""

    value: float
    unit: str
    target: float
    more: Mapping[str, float] = field(default_factory=dict)
    least: bool = False
    """True if the figure should be at least the target, else at most."""

    @property
    def meets(self) -> bool:
        """True if the target is met."""
        return self.value >= self.target if self.least else self.value <= self.target


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked."""
    args = options().parse_args(words)
    torch.set_num_threads(args.threads or dist.cores())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = Sizes(args.scale, args.rounds, device, args.images)
    found: dict[str, Figure | str] = {}
    for name in args.only or PARTS:
        found[name] = PARTS[name](sizes)
    on = machine(torch.get_num_threads())
    show(found, f"{on}, scale {args.scale:g}")
    if args.json:
        rows = {
            name: figure if isinstance(figure, str) else asdict(figure) | {"meets": figure.meets}
            for name, figure in found.items()
        }
        result = {"machine": on, "scale": args.scale, "figures": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def options() -> argparse.ArgumentParser:
    """The options of the command line."""
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m unic_ds.harness.bench",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, metavar="NAME", help=f"some of: {', '.join(PARTS)}")
    add("--scale", type=float, default=1.0, help="factor of rows, images and trials (default 1)")
    add("--rounds", type=int, default=3, help="rounds of what is compared (default 3)")
    add("--threads", type=int, default=0, help="threads (default: number of cores)")
    add("--images", default="", help="folder of images (default: the demonstration's)")
    add("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser


def planted(rows: int, width: int, classes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (R, C) of Gaussian classes, with channels of falling scale, and labels (R)."""
    made = torch.Generator().manual_seed(seed)
    label_R = torch.arange(rows) % classes
    centre_LC = torch.randn(classes, width, generator=made)
    scale_C = torch.arange(1, width + 1).float().pow(-0.5)
    noise_RC = torch.randn(rows, width, generator=made)
    return (0.15 * centre_LC[label_R] + noise_RC) * 4 * scale_C, label_R


def seconds(body: Callable[[], Any]) -> float:
    """Wall time of a call, with what it left to the device."""
    began = time.perf_counter()
    body()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(
    one: Callable[[], Any], other: Callable[[], Any], rounds: int
) -> tuple[float, float, float]:
    """Median of the ratios one / other of times, and the median times, after a warm-up."""
    one(), other()
    pairs = [(seconds(one), seconds(other)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, *(statistics.median(times) for times in zip(*pairs, strict=True))


def knn(sizes: Sizes) -> Figure | str:
    """kNN accuracy of 4,096 queries among 50,000 x 1,024 rows, beside faiss's search alone."""
    if not HAS_FAISS:
        return "skipped: faiss is not installed (pip install faiss-cpu)"
    faiss.omp_set_num_threads(torch.get_num_threads())
    width, classes = sizes(1024, 8), sizes(1000, 2)
    rows_RC, label_R = planted(sizes(50_000, 64) + sizes(4096, 8), width, classes)
    queries = sizes(4096, 8)
    bank_NC, query_QC = rows_RC[queries:], rows_RC[:queries]
    bank, query = (
        Rows(x.to(sizes.device), label.to(sizes.device))
        for x, label in ((bank_NC, label_R[queries:]), (query_QC, label_R[:queries]))
    )

    def theirs() -> None:
        index = faiss.IndexFlatIP(width)
        index.add(F.normalize(bank_NC).numpy())
        index.search(F.normalize(query_QC).numpy(), 10)

    ratio, ours_s, faiss_s = in_turns(
        lambda: knn_accuracies(bank, query, ks=(10,), temperature=0.07), theirs, sizes.rounds
    )
    return Figure(ratio, "x faiss", 1.2, {"ours_s": ours_s, "faiss_s": faiss_s})


def lbfgs(sizes: Sizes) -> Figure:
    """UNIC's probe of small sets: 5,000 x 768 features, 10 classes, 40 trials."""
    x_NC, label_N = planted(sizes(5000, 40), sizes(768, 8), 10)
    train = FeatureSet({"m": x_NC}, torch.arange(len(x_NC)), label_N)
    trials = sizes(TRIALS, 2)
    spent = seconds(lambda: fit_optuna(train, seed=0, device=sizes.device, trials=trials))
    return Figure(spent, "s", 180, {"trials": trials})


def sgd(sizes: Sizes) -> Figure:
    """Sixteen pairs of rate and decay at once, beside one: 20,000 x 768 features, 10 classes.

    `products_s`: the matrix products of the sixteen alone, which bound the ratio from below.
    """
    x_NC, class_N = planted(sizes(20_000, 64), sizes(768, 8), 10)
    split = Split(unit_length(x_NC).to(sizes.device), class_N.to(sizes.device))
    schedule = Schedule(epochs=3, batch=1024, rows=len(class_N))
    trial = Trial(split, torch.arange(len(class_N)), schedule, 10)

    def heads(count: int) -> None:
        rate_P = torch.logspace(-1, 2, count, device=sizes.device)
        trial.heads(rate_P, torch.zeros_like(rate_P), seed=0)

    def products() -> None:
        weight_HD = split.x_RD.new_zeros(16 * 10, split.x_RD.shape[1])
        for _ in range(schedule.epochs):
            for x_BD in split.x_RD.split(schedule.batch):
                product(product(weight_HD, x_BD), x_BD.T)

    ratio, many_s, one_s = in_turns(lambda: heads(16), lambda: heads(1), sizes.rounds)
    _, products_s, _ = in_turns(products, lambda: None, sizes.rounds)
    more = {"sixteen_s": many_s, "one_s": one_s, "products_s": products_s}
    return Figure(ratio, "x one pair", 2, more)


def extraction(sizes: Sizes) -> Figure:
    """Features of image files, beside forwards of images in memory: ViT-B/16 at 224 px.

    On a CPU the decoding takes the cores of the forward: a smaller model comes further from it.
    """
    model = encoder(sizes.device, BASE, BASE_SIDE)
    with tempfile.TemporaryDirectory(prefix="unic_ds-bench-") as temporary:
        count = IMAGES if sizes.device.type == "cuda" else IMAGES // 20
        (images,) = image_sets(sizes, Path(temporary), (sizes(count, 2),))
        ready = [batch.images[BASE_SIDE] for batch in images.batches([BASE_SIDE])]

        @torch.inference_mode()
        def forward() -> None:
            for image_B3HW in ready:
                model.encode(image_B3HW, frozenset({"cls"}))

        ratio, bare_s, spent = in_turns(forward, lambda: extract([model], images), sizes.rounds)
        speed = {"images_per_s": len(images) / spent, "forward_per_s": len(images) / bare_s}
    return Figure(100 * ratio, "% of the bare forward", 95, speed, least=True)


def probe(sizes: Sizes) -> Figure:
    """kNN and linear probe of a ViT-Ti on 2,000 image files at 112 px, from files to accuracies."""
    with tempfile.TemporaryDirectory(prefix="unic_ds-bench-") as temporary:
        counts = sizes(IMAGES * 3 // 4, 24), sizes(IMAGES // 4, 8)
        train, val = image_sets(sizes, Path(temporary), counts)
        options = config.Eval()
        of = EvalData({"train": train, "val": val}, options=options, seed=0, device=sizes.device)
        model = encoder(sizes.device, TINY, TINY_SIDE)
        spent = seconds(lambda: registry.evaluate_models([model], of, ["knn", "linear"]))
    return Figure(spent, "s", 60, {"images": len(train) + len(val)})


PARTS: dict[str, Callable[[Sizes], Figure | str]] = {
    "knn": knn,
    "lbfgs": lbfgs,
    "sgd": sgd,
    "extraction": extraction,
    "probe": probe,
}


def encoder(device: torch.device, arch: str, size: int) -> Model:
    """A ViT with random weights."""
    cfg = config.Student(model=arch, size=size)
    student = Student(cfg, config.Ladder(), {}, seed=0).to(device).eval()

    @torch.no_grad()
    def encode(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        return Outputs(*student.encode(image_B3HW))

    return Model(arch, size, frozenset({"cls", "patch"}), encode)


def image_sets(sizes: Sizes, temporary: Path, counts: Sequence[int]) -> list[SampledImages]:
    """Disjoint sets of so many images."""
    folder = sizes.images or str(demo.root() / "images")
    if not Path(folder).is_dir():
        folder = str(make_photographs(temporary / "images", sum(counts)))
    whole = data.scan(folder)
    cfg = config.Config()
    order_N = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).numpy()
    sets = []
    for at, count in enumerate(counts):
        images = SampledImages(whole, cfg, name=f"part {at}")
        images.chosen_N = np.sort(order_N[sum(counts[:at]) :][:count])
        sets.append(images)
    return sets


def show(found: Mapping[str, Figure | str], title: str) -> None:
    """Print the figures as a table."""
    terminal = Console()
    terminal.print(title)
    table = Table("part", "figure", "target", "", "details")
    for name, figure in found.items():
        if isinstance(figure, str):
            table.add_row(name, figure, "", "", "")
            continue
        more = ", ".join(f"{key} {value:.4g}" for key, value in figure.more.items())
        bound = f"{'>=' if figure.least else '<='} {figure.target:g}"
        value = f"{figure.value:.2f} {figure.unit}"
        table.add_row(name, value, bound, "met" if figure.meets else "missed", more)
    terminal.print(table)


if __name__ == "__main__":
    main()
