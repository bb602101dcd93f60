"""Compares this code with the published method: `python tests/support/parity.py DIR`.

DIR holds vectors, numbers that the authors' program gave for given inputs (method: section 7):
`loss.npz`, `ladder.npz`, `standardise.npz`, `schedules.json`, and `published_format.pth` with
`published_format_io.npz`; of any seed, size and number of cases. What is absent is said and
skipped. Each quantity is computed by the functions that training uses, and its largest relative
error is a line; the exit code is 1 where one is over its tolerance, 2 where there is nothing to
compare.

The relative error of a tensor is max |ours - theirs| / max |theirs|, of a quantity the largest of
its tensors; every value of a schedule counts as a tensor of its own. A tensor of another shape, a
NaN and a name that only one side has count as infinite.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from unic_ds import config
from unic_ds.engine import optim
from unic_ds.losses.distill import distill_loss
from unic_ds.losses.dropping import Dropping
from unic_ds.models.ladder import Head, Ladder
from unic_ds.models.student import Student
from unic_ds.teachers.standardise import Standardiser
from unic_ds.tokens import KINDS, Target, Tokens
from unic_ds.weights import import_unic
from unic_kernels.ops import FUSED, Ops

EXACT, PUBLISHED = 1e-5, 1e-4


class Row(NamedTuple):
    """One quantity's largest relative error; `worst` is the tensor that has it."""

    quantity: str
    error: float
    tolerance: float
    worst: str = ""

    @property
    def ok(self) -> bool:
        """True if the error is within the tolerance; a NaN is not."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        judged = f"{'ok' if self.ok else 'OVER'} (tolerance {self.tolerance:.0e}"
        worst = f"; worst: {self.worst}" if self.worst else ""
        return f"{self.quantity:<34} {self.error:8.1e}  {judged}{worst})"


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|; infinite where shapes differ or a value is no number."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.shape != theirs.shape:
        return math.inf
    if ours.numel() == 0:
        return 0.0
    gap, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if gap == 0:
        return 0.0
    return gap / size if size > 0 and math.isfinite(gap) else math.inf


def compare(
    quantity: str, pairs: dict[str, tuple[Tensor, Tensor]], tolerance: float = EXACT
) -> Row:
    """The Row of a quantity from (ours, theirs) of each of its tensors."""
    errors = {name: error(ours, theirs) for name, (ours, theirs) in pairs.items()}
    worst = max(errors, key=lambda name: errors[name])
    return Row(quantity, errors[worst], tolerance, worst if errors[worst] else "")


def names(quantity: str, ours: Any, theirs: Any) -> Row:
    """A Row of error 0 where two state dicts have the same names, else infinite, naming one."""
    apart = sorted(set(ours) ^ set(theirs))
    return Row(quantity, math.inf if apart else 0.0, EXACT, apart[0] if apart else "")


def cases(file: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(name, arrays by key without it) of every case of an npz, in order of number."""
    arrays = load(file)
    found = {key.split("_", 1)[0] for key in arrays}
    for case in sorted(found, key=lambda name: (len(name), name)):
        prefix = f"{case}_"
        yield case, {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def load(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz, read without pickles."""
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def tensor(value: np.ndarray) -> Tensor:
    """An array as a tensor of its own memory."""
    return torch.from_numpy(np.array(value))


def our_loss(
    pred: dict[str, Tokens], target: dict[str, Tokens], uniform_TB: Tensor, rate: float, ops: Ops
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's loss, its losses per (teacher, image), summed coefficients per teacher."""
    seen = []

    class Watched(Dropping):
        def forward(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
            weight_TB = super().forward(loss_TB, uniform_TB)
            seen.append((loss_TB, weight_TB.sum(1)))
            return weight_TB

    dropping = Watched(torch.ones(len(pred)), config.Drop(rate=rate), "kept", ops)
    targets = {name: Target.of(tokens) for name, tokens in target.items()}
    loss, _ = distill_loss(pred, targets, uniform_TB, loss=config.Loss(), balance=dropping, ops=ops)
    return loss, *seen[0]


def check_loss(file: Path, ops: Ops = FUSED) -> Iterator[Row]:
    """Loss, losses per (teacher, image), coefficients and gradients of every case."""
    for case, take in cases(file):
        teachers = [str(name) for name in take["teachers"]]
        pred, target = (
            {
                name: Tokens(*(tensor(take[f"{side}_{name}_{kind}"]) for kind in KINDS))
                for name in teachers
            }
            for side in ("pred", "target")
        )
        leaves = {
            f"{name}_{kind}": value.requires_grad_()
            for name in teachers
            for kind, value in zip(KINDS, pred[name], strict=True)
        }
        uniform_TB = tensor(take["uniform_TB"])
        loss, loss_TB, coeff_T = our_loss(pred, target, uniform_TB, float(take["drop_prob"]), ops)
        loss.backward()
        yield compare(f"loss {case} loss", {"": (loss, tensor(take["loss"]))})
        yield compare(f"loss {case} loss_TB", {"": (loss_TB, tensor(take["loss_TB"]))})
        yield compare(f"loss {case} coefficients", {"": (coeff_T, tensor(take["coeff_T"]))})
        yield compare(
            f"loss {case} gradients",
            {key: (gradient(leaf), tensor(take[f"grad_{key}"])) for key, leaf in leaves.items()},
        )


def gradient(leaf: Tensor) -> Tensor:
    """Gradient of a leaf; zeros if it has none."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def check_ladder(file: Path, ops: Ops = FUSED) -> Iterator[Row]:
    """State-dict names, outputs, input gradients and weight gradients of every case."""
    for case, take in cases(file):
        weights = {k.removeprefix("w:"): tensor(v) for k, v in take.items() if k.startswith("w:")}
        outs = {k.removeprefix("y_"): tensor(v) for k, v in take.items() if k.startswith("y_")}
        ladder = build_ladder(json.loads(str(take["config"])), take, outs, ops)
        yield names(f"ladder {case} names", ladder.export_state_dict(), weights)
        if ladder.export_state_dict().keys() != weights.keys():
            continue
        load_exported(ladder, weights)
        leaves = {
            f"{kind}{block + 1}": tensor(take[f"x_{kind}{block + 1}"]).requires_grad_()
            for block in ladder.blocks
            for kind in KINDS
        }
        states = [Tokens(*(leaves[f"{k}{block + 1}"] for k in KINDS)) for block in ladder.blocks]
        ours = {
            f"{name}_{kind}": value
            for name, tokens in ladder(states).items()
            for kind, value in zip(KINDS, tokens, strict=True)
        }
        yield compare(f"ladder {case} outputs", {k: (ours[k], y) for k, y in outs.items()})
        torch.autograd.backward([ours[k] for k in outs], [tensor(take[f"gy_{k}"]) for k in outs])
        yield compare(
            f"ladder {case} input gradients",
            {key: (gradient(x), tensor(take[f"gx_{key}"])) for key, x in leaves.items()},
        )
        grads = {name: gradient(weight) for name, weight in ladder.named_parameters()}
        yield compare(
            f"ladder {case} weight gradients",
            {k: (g, tensor(take[f"gw:{k}"])) for k, g in ladder.export_state_dict(grads).items()},
        )


@torch.no_grad()
def load_exported(ladder: Ladder, weights: dict[str, Tensor]) -> None:
    """Copy weights into a ladder by their published names."""
    for name, value in ladder.export_state_dict().items():
        value.copy_(weights[name])


def build_ladder(
    settings: dict[str, Any], take: dict[str, np.ndarray], outs: dict[str, Tensor], ops: Ops
) -> Ladder:
    """The Ladder of a case; `which_blocks` left out means all of them."""
    depth = max(int(key[5:]) for key in take if re.fullmatch(r"x_cls\d+", key))
    cfg = config.Ladder(
        rungs=",".join(map(str, settings.get("which_blocks") or range(depth))),
        width=settings["hidden_dim"],
        last_width=settings["last_hidden_dim"],
        prenorm=settings.get("prenorm", False),
        midnorm=settings.get("midnorm", False),
    )
    widths = {key[: -len("_cls")]: y.shape[-1] for key, y in outs.items() if key.endswith("_cls")}
    heads = {name: Head(width) for name, width in widths.items()}
    return Ladder(take[f"x_cls{depth}"].shape[-1], depth, heads, cfg, ops=ops)


def check_standardise(file: Path) -> Iterator[Row]:
    """Targets, and running mean and std after each step, over all consecutive steps."""
    take = {key: tensor(value) for key, value in load(file).items()}
    steps = sorted(int(key[3:-2]) for key in take if re.fullmatch(r"cls\d+_x", key))
    norm = Standardiser(
        take[f"cls{steps[0]}_x"].shape[-1], config.Standardise(std_floor=0.0, target_clamp=0.0)
    )
    pairs: dict[str, dict[str, tuple[Tensor, Tensor]]] = {"y": {}, "mean": {}, "std": {}}
    for step in steps:
        tokens = Tokens(*(take[f"{kind}{step}_x"] for kind in KINDS))
        target = norm(tokens).standardised()
        norm.observe(tokens)
        norm.track(norm.moments()[None], float(take[f"cls{step}_momentum"]))
        for i, kind in enumerate(KINDS):
            key = f"{kind}{step}"
            pairs["y"][key] = target[i], take[f"{key}_y"]
            # track() moves them in place: this step's are kept
            pairs["mean"][key] = norm.mean_2C[i].clone(), take[f"{key}_mean_after"].flatten()
            pairs["std"][key] = norm.std_2C[i].clone(), take[f"{key}_std_after"].flatten()
    for quantity, found in pairs.items():
        yield compare(f"standardise {quantity}", found)


def check_schedules(file: Path) -> Iterator[Row]:
    """Learning rate and momentum at every step of the loop, which counts from 1."""
    schedules: dict[str, Callable[[int, dict[str, Any]], float]] = {
        "lr": learning_rate,
        "tnorm_momentum": momentum,
    }
    for name, row in json.loads(file.read_text()).items():
        pairs = {
            f"step {step}": (
                torch.tensor(schedules[name](step, row["args"]), dtype=torch.double),
                torch.tensor(value, dtype=torch.double),
            )
            for step, value in enumerate(row["values"], 1)
        }
        yield compare(f"schedules {name}", pairs)


def learning_rate(step: int, args: dict[str, Any]) -> float:
    """The loop's learning rate under the authors' arguments, in batches of one image."""
    cfg = config.Optim(
        batch_size=1,
        lr=args["base_value"],
        lr_scaling="none",
        lr_end=args["final_value"],
        epochs=args["epochs"],
        warmup_epochs=args["warmup_epochs"],
    )
    return optim.learning_rate(step, cfg, args["niter_per_ep"])


def momentum(step: int, args: dict[str, Any]) -> float:
    """The loop's momentum under the authors' arguments; it starts at 1 and has no warm-up."""
    cfg = config.Standardise(momentum_end=args["final_value"])
    return optim.momentum(step, cfg, args["epochs"] * args["niter_per_ep"])


def check_published(file: Path) -> Iterator[Row]:
    """Names of the ladder, exported features and predictions of an imported checkpoint."""
    found, take = import_unic.read(file), load(file.with_name("published_format_io.npz"))
    student = Student(found.student, found.ladder, found.heads, seed=0).eval()
    yield names("published names", student.ladder.export_state_dict(), found.ladder_state)
    student.encoder.load_state_dict(found.encoder_state)
    load_exported(student.ladder, found.ladder_state)
    # Their images are normalised; the student takes what is not, and normalises.
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (found.student.mean, found.student.std))
    image_B3HW = (tensor(take["image"]) * std + mean) * 255
    tokens = student.encode(image_B3HW)
    features = {"x_norm_clstoken": tokens.cls_BC, "x_norm_patchtokens": tokens.patch_BNC}
    with torch.no_grad():
        pred = student(image_B3HW)
    features |= {
        f"y_{name}_{kind}": value
        for name, tokens in pred.items()
        for kind, value in zip(KINDS, tokens, strict=True)
    }
    yield names("published outputs' names", features, take.keys() - {"image"})
    for key, value in features.items():
        yield compare(f"published {key}", {"": (value, tensor(take[key]))}, PUBLISHED)


CHECKS = {
    "loss.npz": check_loss,
    "ladder.npz": check_ladder,
    "standardise.npz": check_standardise,
    "schedules.json": check_schedules,
    "published_format.pth": check_published,
}


def over(rows: Iterable[Row]) -> list[str]:
    """The lines of what is over its tolerance; for tests, which must compare something."""
    rows = list(rows)
    assert rows, "nothing was compared"
    return [str(row) for row in rows if not row.ok]


def main(argv: list[str]) -> int:
    """Compare what a folder holds, a line per quantity; the exit code."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    folder, rows = Path(argv[0]), []
    for name, check in CHECKS.items():
        beside = ["published_format_io.npz"] if name == "published_format.pth" else []
        if absent := [n for n in (name, *beside) if not (folder / n).is_file()]:
            print(f"skipped: {folder} has no {' and no '.join(absent)}")
            continue
        try:
            for row in check(folder / name):
                print(row, flush=True)
                rows.append(row)
        except (KeyError, ValueError, OSError, BadZipFile) as problem:
            print(
                f"parity: error: {folder / name} holds no such vectors: {problem}", file=sys.stderr
            )
            return 2
    if not rows:
        print(f"parity: error: {folder} holds none of {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    over = [row.quantity for row in rows if not row.ok]
    print(f"{len(rows) - len(over)} of {len(rows)} quantities within their tolerances")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
