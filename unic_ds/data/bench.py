"""How fast images come: ours beside torchvision's own loader, on the same files.

    python -m unic_ds.data.bench                     photographs of 500 x 375 made on the spot
    python -m unic_ds.data.bench --images DIR        yours: a folder, tar shards or a list
    python -m unic_ds.data.bench --json bench.json

Every way reads, decodes and augments whole batches with as many threads (or worker processes) as
the others. They take turns, round after round, so that a busy machine is busy for all; ratios are
medians over rounds. Where there is a GPU, DALI also decodes on it.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from unic_ds import dist
from unic_ds.config import Data
from unic_ds.data import Source, Stream, backend, order, pack, scan
from unic_ds.data.augmentation import draw
from unic_ds.data.reader import Reader
from unic_ds.data.shards import Shards
from unic_ds.data.source import MAX_MB, Mixture
from unic_ds.data.string_table import StringTable
from unic_ds.process import console

MANY = 1_281_167  # images of ImageNet-1k, whose index is measured
MADE = 384  # photographs made where none are named
Make = Callable[[], Iterator[Any]]


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    args = options().parse_args()
    threads = args.threads or dist.cores()
    with tempfile.TemporaryDirectory(prefix="unic_ds-bench-") as temporary:
        source = scan(args.images or photographs(Path(temporary) / "images"))
        pack.pack(source, Path(temporary) / "pack", pack.Settings(shard_mb=16), workers=threads)
        packed = scan(Path(temporary) / "pack")
        made = ways(source, packed, args.size, args.batch, threads)
        slow = distant(source, args.latency_ms / 1e3)
        for readers in args.readers:
            cfg = Data(threads=threads, readers=readers)
            made[f"readers {readers}"] = stream_of(slow, cfg, args.size, args.batch)
        speed = race(made, args.batch, args.batches, args.rounds)
        before = before_decoding(source, args.batch)
    result = {
        "machine": machine(threads),
        "images": len(source),
        "size": args.size,
        "batch": args.batch,
        "images_per_s": {name: statistics.median(rounds) for name, rounds in speed.items()},
        "ratios": ratios(speed),
        "order_draws_reading_us": before * 1e6,
        **index(),
    }
    ours = result["images_per_s"].get("DALI on the CPU")
    if ours:
        result["order_draws_reading_share"] = before * ours
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def options() -> argparse.ArgumentParser:
    """The command line."""
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m unic_ds.data.bench",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", help="what --data.train takes; default: photographs made on the spot")
    add("--size", type=int, default=224, help="pixels that leave (default 224)")
    add("--batch", type=int, default=32, help="images of a batch (default 32)")
    add("--batches", type=int, default=16, help="batches timed in a round (default 16)")
    add("--rounds", type=int, default=5, help="rounds (default 5)")
    add("--threads", type=int, default=0, help="threads or workers (default: the cores)")
    add("--readers", type=int, nargs="+", default=[], help="also measure so many reader threads")
    add("--latency_ms", type=float, default=0, help="that those wait for each file (default 0)")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def photographs(folder: Path) -> Path:
    """JPEGs of 500 x 375 in ten classes: crops of the two photographs that scikit-learn brings."""
    from sklearn.datasets import load_sample_images

    scenes = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in console.track(range(MADE), MADE, "photographs"):
        scene = scenes[i % len(scenes)]
        width = int(rng.integers(380, scene.height * 4 // 3))
        height = width * 3 // 4
        x, y = int(rng.integers(scene.width - width)), int(rng.integers(scene.height - height + 1))
        file = folder / f"class_{i % 10}" / f"{i:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        cut = scene.crop((x, y, x + width, y + height)).resize((500, 375))
        cut.save(file, quality=90)
    return folder


def ways(source: Source, packed: Source, size: int, batch: int, threads: int) -> dict[str, Make]:
    """Name -> what makes its endless batches."""
    twin, dali = (Data(backend=name, threads=threads) for name in ("torch", "dali"))
    made = {"torchvision, PIL": lambda: plain(source, size, batch, threads, tensors=False)}
    made["torchvision, tensors"] = lambda: plain(source, size, batch, threads, tensors=True)
    made["torch twin"] = stream_of(source, twin, size, batch)
    if backend(Data()) == "dali":
        made["DALI on the CPU"] = stream_of(source, dali, size, batch)
        made["DALI on the CPU, packed"] = stream_of(packed, dali, size, batch)
        if torch.cuda.is_available():
            made["DALI mixed (GPU)"] = stream_of(source, dali, size, batch, "cuda")
            made["DALI mixed (GPU), packed"] = stream_of(packed, dali, size, batch, "cuda")
    return made


def stream_of(source: Source, cfg: Data, size: int, batch: int, device: str = "cpu") -> Make:
    """Our endless batches of a source."""
    return lambda: Stream(
        source,
        cfg,
        seed=0,
        sizes=(size,),
        batch_size=batch,
        micro=batch,
        rank=0,
        world=1,
        device=torch.device(device),
    )


@dataclass(frozen=True, eq=False)
class Distant(Mixture):
    """A source whose files come late."""

    latency_s: float = 0.0

    def read(self, index: int, max_mb: float = MAX_MB) -> NDArray[np.uint8]:
        """Bytes of a sample after the latency."""
        time.sleep(self.latency_s)
        return super().read(index, max_mb)


def distant(source: Source, latency_s: float) -> Source:
    """The same samples as on a file server that takes so long for each."""
    fields = source.folder, source.names, source.classes, source.label_N
    return Distant(*fields, (source,), (1.0,), latency_s) if latency_s else source


class Plain(Dataset[torch.Tensor]):
    """Images by PIL and torchvision's transforms, as a plain script does it."""

    def __init__(self, source: Source, size: int, *, tensors: bool):
        """`tensors`: PIL only decodes, all else is torchvision's tensor operations."""
        cfg = Data()
        self.source, self.tensors = source, tensors
        ratio = (1 / cfg.ratio_max, cfg.ratio_max)
        bicubic = v2.InterpolationMode.BICUBIC
        colour = v2.ColorJitter(cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue)
        sigma = (cfg.blur_min, cfg.blur_max)
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, (cfg.crop_min, 1), ratio, bicubic, antialias=True),
                v2.RandomHorizontalFlip(cfg.flip),
                v2.RandomApply([colour], cfg.jitter),
                v2.RandomGrayscale(cfg.grey),
                v2.RandomApply([v2.GaussianBlur(9, sigma)], cfg.blur),
                v2.RandomSolarize(128, cfg.solarise),
            ]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(io.BytesIO(self.source.read(index).tobytes())) as file:
            image = file.convert("RGB")
        if self.tensors:
            return self.augment(V.pil_to_tensor(image))
        return V.pil_to_tensor(self.augment(image))


def plain(
    source: Source, size: int, batch: int, workers: int, *, tensors: bool
) -> Iterator[torch.Tensor]:
    """Batches of torchvision's own loader, epoch after epoch."""
    torch.manual_seed(0)
    loader = DataLoader(
        Plain(source, size, tensors=tensors),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    while True:
        yield from loader


def race(made: dict[str, Make], batch: int, batches: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each way in each round."""
    speed: dict[str, list[float]] = {name: [] for name in made}
    turns = [(turn, name) for turn in range(rounds) for name in made]
    running = {name: make() for name, make in made.items()}
    for turn, name in console.track(turns, len(turns), "rounds"):
        stream = running[name]
        for _ in islice(stream, batches if turn == 0 else batches // 2):
            pass  # start, and use up what was decoded while others had their turn
        start = time.perf_counter()
        for images in islice(stream, batches):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            del images
        speed[name].append(batch * batches / (time.perf_counter() - start))
    for stream in running.values():
        stream.close()  # type: ignore[attr-defined]
    return speed


def ratios(speed: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds of the ratios within a round; torchvision's is its faster way."""
    plain = speed["torchvision, PIL"], speed["torchvision, tensors"]
    theirs = [max(pair) for pair in zip(*plain, strict=True)]
    ours = {name: rounds for name, rounds in speed.items() if not name.startswith("torchvision")}
    found = {
        f"{name} / torchvision": statistics.median(
            a / b for a, b in zip(rounds, theirs, strict=True)
        )
        for name, rounds in ours.items()
    }
    for name in ("DALI on the CPU", "DALI mixed (GPU)"):
        if name in speed:
            pairs = zip(speed[f"{name}, packed"], speed[name], strict=True)
            found[f"{name}: packed / folder"] = statistics.median(a / b for a, b in pairs)
    return found


def before_decoding(source: Source, batch: int) -> float:
    """Seconds per image that order, draws and reading bytes with their headers take one thread."""
    cfg = Data()
    reader, runs = Reader(source, cfg), source.runs(cfg.window)
    count = max(1, len(source) // batch)
    seconds = []
    for epoch in range(5):
        start = time.perf_counter()
        for k in range(count):
            index_B, pass_B = order.batch(0, runs, (epoch * count + k) * batch, batch)
            samples = [reader.read(index) for index in index_B.tolist()]
            width_B, height_B = [s.width for s in samples], [s.height for s in samples]
            draw(0, index_B, pass_B, width_B, height_B, cfg)
        seconds.append((time.perf_counter() - start) / (count * batch))
    return statistics.median(seconds)


def index() -> dict[str, float]:
    """What MANY images in shards cost to hold, and to begin an epoch of."""
    tracemalloc.start()
    names = StringTable.of(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(MANY))
    shard_N = np.arange(MANY, dtype=np.int32) // 5000
    tars = tuple(f"{s:06d}.tar" for s in range(shard_N[-1] + 1))
    offset_N, size_N = np.arange(MANY), np.full(MANY, 100_000)
    label_N = np.zeros(MANY, np.int32)
    source = Shards(Path(), names, (), label_N, tars, shard_N, offset_N, size_N)
    for epoch in range(2):  # a batch between two epochs holds both
        order.batch(0, source.runs(8), epoch * MANY, 1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    start = time.perf_counter()
    order.batch(0, source.runs(8), 2 * MANY, 1)
    return {"index_mb": held / 1e6, "epoch_start_s": time.perf_counter() - start}


def machine(threads: int) -> str:
    """What ran, for whoever reads the figures."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {found.name: found.version for found in distributions()}
    names = ("torch", "torchvision", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "pillow")
    has = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    return f"{threads} threads, {device}, {has}"


def show(result: dict[str, Any]) -> None:
    """Print the figures as tables."""
    terminal = Console()
    terminal.print(result["machine"])
    what = f"{result['images']} images, {result['size']} px, batches of {result['batch']}"
    table = Table("way", "images/s", "/ torchvision", title=what)
    for name, speed in result["images_per_s"].items():
        ratio = result["ratios"].get(f"{name} / torchvision")
        table.add_row(name, f"{speed:.0f}", f"{ratio:.2f}" if ratio else "")
    terminal.print(table)
    for name, ratio in result["ratios"].items():
        if name.endswith("packed / folder"):
            terminal.print(f"{name} {ratio:.2f}")
    share = result.get("order_draws_reading_share")
    of_time = f", {share:.1%} of the time of DALI on the CPU" if share else ""
    terminal.print(f"order, draws, reading: {result['order_draws_reading_us']:.0f} us{of_time}")
    start = f"an epoch starts in {result['epoch_start_s']:.2f} s"
    terminal.print(f"index of {MANY} images: {result['index_mb']:.0f} MB, {start}")


if __name__ == "__main__":
    main()
