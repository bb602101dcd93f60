"""Forms of one student: size, latency, kNN features, and agreement with the student's own tokens.

A form is a folder: the student's own, or an export of it. Each runs in a process of its own by its
format's program. The processes stay alive, so that rounds of timing go over all forms in turn, and
noise of the machine is in all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unic_ds.evaluate.fidelity import Scale, Sums, empty_sums
from unic_ds.files.documents import read_json
from unic_ds.files.printable import printable
from unic_ds.models.model_folder import LADDER, STATISTICS
from unic_ds.tokens import KINDS
from unic_ds.weights.export import library_of
from unic_ds.weights.formats import FORMATS, verify
from unic_ds.weights.formats.fresh_process import FreshProcess
from unic_ds.weights.formats.handover import Format, Outputs

BATCHES = (1, 32)
"""Images at once whose latency is measured."""
RUNS = {1: 5, 32: 1}
"""Timed runs of a form in a round, of which the median counts."""
ROUNDS, LEAST_ROUNDS, BUDGET_S = 20, 5, 120.0
"""Rounds of timing; after the budget there are no more than the least."""
SETTLE_S = 0.02
"""Pause before a form is timed: threads of the one before spin for a while after their work."""
WEIGHTS = (".safetensors", ".onnx", ".data", ".pt2")
"""Ends of the names of weight files."""
SIDE = {
    "timm": ("config.json", "pretrained_cfg", "input_size"),
    "transformers": ("config.json", "image_size"),
    "onnx": ("preprocessing.json", "size"),
    "pytorch": ("preprocessing.json", "size"),
}
"""File with an export's image size, and the keys to it, by the library's name on the hub."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of a student in a folder."""

    name: str
    path: Path
    format: Format
    size: int
    """Side of its images in pixels."""
    megabytes: float
    """Size of its weight files in 10^6 bytes."""


@dataclass
class Measures:
    """Measurements of a form."""

    form: Form
    seconds: dict[int, list[float]] = field(default_factory=lambda: {b: [] for b in BATCHES})
    """Latency of a batch in each round, by the batch's images."""
    cls: list[Outputs] = field(default_factory=list)
    """`cls` of each batch."""
    agreement: dict[str, Sums] = field(default_factory=dict)
    """Agreement with the student's tokens by kind; none of another width or number of tokens."""
    more: tuple[str, ...] = ()
    """Outputs beside `cls` and `patch`."""


def read_form(path: Path, name: str, library: str = "") -> Form:
    """The form in a folder; ValueError unless it is an export whose outputs are tokens.

    `library` is its library's name on the hub; empty: as its model card says.
    """
    shown = printable(path)
    if not path.is_dir():
        raise ValueError(f"{shown!r} is no folder; give an export of unic-ds export")
    library = library or library_of(path)
    found = next((form for form in FORMATS.values() if form.library == library), None)
    if found is None:
        raise ValueError(
            f"{shown!r} is no export: no model card in it names one of the libraries"
            f" {', '.join(form.library for form in FORMATS.values())}; give one of unic-ds export"
        )
    if found.reference is not None:
        raise ValueError(
            f"{shown!r} is an export for {found.title}, whose outputs are no tokens of the student,"
            " so that they cannot be compared; leave it out"
        )
    names = [n for n in found.files - {LADDER, STATISTICS} if n.endswith(WEIGHTS)]
    sizes = [(path / name).stat().st_size for name in names if (path / name).is_file()]
    if not sizes:
        raise ValueError(f"{shown!r} holds no weights for {found.title}; export it again")
    return Form(
        name=name,
        path=path,
        format=found,
        size=side_of(path, library),
        megabytes=sum(sizes) / 1e6,
    )


def side_of(path: Path, library: str) -> int:
    """Side of an export's images in pixels; ValueError if its files do not have it."""
    file, *keys = SIDE[library]
    try:
        found: object = read_json(path / file)
    except ValueError as error:
        raise ValueError(f"{printable(path / file)!r} cannot be read: {error}") from None
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    side = found[-1] if isinstance(found, list) and found else found
    if not isinstance(side, int) or not 0 < side <= 1 << 14:
        raise ValueError(f"{printable(path / file)!r} has no image size; export the folder again")
    return side


def measure(
    forms: Sequence[Form],
    images: Mapping[int, Sequence[Tensor]],
    *,
    bank: int,
    threads: int,
    say: Callable[[str], None],
) -> list[Measures]:
    """Measures of each form; the first one is the student itself.

    `images` are batches of uint8 B3HW by their side, the same images for each. Of the first `bank`
    batches only CLS is computed. `say` prints progress. RuntimeError if a form does not run or its
    features are not finite.
    """
    found = [Measures(form) for form in forms]
    with ExitStack() as stack:
        processes = []
        for form in forms:
            say(f"loading {form.name}")
            process = FreshProcess(form.format, form.path, named=form.name, threads=threads)
            processes.append(stack.enter_context(process))
        say("features")
        for i in range(len(images[forms[0].size])):
            outputs = []
            for row, process in zip(found, processes, strict=True):
                batch = images[row.form.size][i]
                outputs.append(process.outputs(batch, names=("cls",) if i < bank else ()))
                check(row.form, outputs[-1])
                row.cls.append(verify.cls_alone(outputs[-1]))
                row.more = tuple(sorted(outputs[-1].keys() - {*KINDS}))
            if i >= bank:
                for row, ours in zip(found, outputs, strict=True):
                    add_agreement(row, outputs[0], ours)
        time_rounds(found, processes, images, say)
    return found


def check(form: Form, outputs: Outputs) -> None:
    """RuntimeError unless outputs are finite tokens."""
    for name in set(KINDS) & outputs.keys():
        if not outputs[name].isfinite().all():
            raise RuntimeError(f"{form.name} gives {name} tokens that are NaN or infinite")
    if "cls" not in outputs:
        raise RuntimeError(f"{form.name} gives {', '.join(sorted(outputs))}, and no cls")


def add_agreement(row: Measures, target: Outputs, found: Outputs) -> None:
    """Add a batch to the agreement of a form's tokens with the student's, of the same shape."""
    for kind in KINDS:
        x, y = target.get(kind), found.get(kind)
        if x is None or y is None or x.shape != y.shape:
            continue
        target_NC, pred_NC = x.flatten(0, -2).double(), y.flatten(0, -2).double()
        if kind not in row.agreement:
            row.agreement[kind] = empty_sums(target_NC, row.form.size, cka=False)
        sums, zeros_C = row.agreement[kind], torch.zeros_like(target_NC[0])
        per_image = len(target_NC) // len(x)
        sums.add(target_NC, pred_NC, Scale(zeros_C, zeros_C + 1), per_image=per_image)
        sums.images += len(x)


def time_rounds(
    found: Sequence[Measures],
    processes: Sequence[FreshProcess],
    images: Mapping[int, Sequence[Tensor]],
    say: Callable[[str], None],
) -> None:
    """Add the latency of each form in rounds over all forms, each of which begins with another."""
    shown = {side: max(batches, key=len) for side, batches in images.items()}
    pairs = list(zip(found, processes, strict=True))
    began = time.monotonic()
    for i in range(-1, ROUNDS):  # the first one is a warm-up
        if i >= LEAST_ROUNDS and time.monotonic() - began > BUDGET_S:
            break
        if i % 5 == 0:
            say(f"latency: round {i + 1} of {ROUNDS}")
        at = i % len(pairs)
        for row, process in pairs[at:] + pairs[:at]:
            time.sleep(SETTLE_S)
            image_B3HW = shown[row.form.size]
            for count in BATCHES:
                taken_B = torch.arange(count) % len(image_B3HW)
                # The form before has had the caches: a first run is not counted.
                runs = process.seconds(image_B3HW[taken_B], runs=RUNS[count] + (count == 1))
                if i >= 0:
                    timed = torch.tensor(runs[-RUNS[count] :], dtype=torch.float64)
                    row.seconds[count].append(timed.median().item())
