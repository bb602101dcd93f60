"""Teachers from a weight file of a timm architecture: `file:PATH#arch=NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from unic_ds import config
from unic_ds.config.job import weight_file
from unic_ds.files import encodable
from unic_ds.files.printable import printable
from unic_ds.files.tensor_files import Safetensors
from unic_ds.teachers import weight_files
from unic_ds.teachers.adapters import TeacherModel
from unic_ds.teachers.sources.contract import Source
from unic_ds.teachers.sources.timm import (
    beheaded,
    check_arch,
    own_size,
    with_weights,
    without_weights,
)

MOST_CLASSES = 1_000_000
"""Outputs of the largest classifier in a weight file: it is built before the weights are read."""


def read(row: config.Teacher, grid: int) -> TeacherModel:
    """Local safetensors or weights-only .pth, through timm's own filters."""
    model = beheaded(row, *whole(row, grid))
    return model._replace(licence=licence_of(weight_file(row)))


def whole(row: config.Teacher, grid: int) -> tuple[int, nn.Module]:
    """(image side, the model with the classifier of its file, if there is one)."""
    path = weight_file(row)
    return with_weights_of(row, grid, path, {"file": str(encodable(path))})


def outline(row: config.Teacher, grid: int) -> TeacherModel:
    """The architecture without weights, on meta."""
    arch = row.parsed_source.model
    check_arch(row, arch)
    return without_weights(row, grid, arch)


def with_weights_of(
    row: config.Teacher, grid: int, path: Path, overlay: dict[str, Any]
) -> tuple[int, nn.Module]:
    """(image side, a timm model) with weights that `overlay` names: those of the file at `path`."""
    arch = row.parsed_source.model
    check_arch(row, arch)
    classes = classes_of(row, path, arch)
    # The head is built as in the file: timm is strict only if the numbers of classes agree.
    overlay |= {"num_classes": classes, "label_offset": 0, "custom_load": False}
    return with_weights(row, grid, arch, overlay, num_classes=classes)


def check_weights(row: config.Teacher, grid: int) -> None:
    """ValueError unless the weights of a file: teacher have its architecture's names and shapes.

    They are mapped and not read. A filter of timm that looks at values is not run to its end: such
    weights are checked when they are loaded.
    """
    path = weight_file(row)
    try:
        state = {k: x.to("meta") for k, x in weight_files.state_of(path).items()}
    except (ValueError, AttributeError):  # `classes_of` says what is wrong with the file
        state = {}
    try:
        with torch.device("meta"):
            beheaded(row, *with_weights_of(row, grid, path, {"state_dict": state}))
    except ValueError as error:
        cause = error.__cause__
        if not isinstance(cause, NotImplementedError) and "meta tensor" not in str(cause):
            raise


def classes_of(row: config.Teacher, path: Path, arch: str) -> int:
    """Classes of the classifier in a weight file (0: none); ValueError if it has no weights."""
    cfg = timm.get_pretrained_cfg(arch)
    names = (cfg and cfg.classifier) or ()
    try:
        state = weight_files.state_of(path)
        wrong = (
            weight_files.foreign(state)
            or weight_files.integers(state, arch)
            or weight_files.patches(state)
        )
        if wrong:
            raise ValueError(f"{str(path)!r} holds no weights of {arch}: {wrong}")
    except ValueError as error:
        raise ValueError(f"teacher {row.name!r}: {error}; give it as safetensors") from None
    named = [f"{name}.weight" for name in ([names] if isinstance(names, str) else names)]
    heads = [state[name] for name in named if name in state]
    if any(head.ndim < 2 or not 0 < head.shape[0] <= MOST_CLASSES for head in heads):
        shapes = ", ".join(str(tuple(head.shape)) for head in heads)
        raise ValueError(
            f"teacher {row.name!r}: {str(path)!r} has a classifier of shape {shapes}, not [classes,"
            f" channels] with at most {MOST_CLASSES} classes; remove it from the file"
        )
    return heads[0].shape[0] if heads else 0


def licence_of(path: Path) -> str:
    """The `licence` entry of a safetensors file's metadata, or nothing."""
    if path.suffix != ".safetensors":
        return ""
    return printable(Safetensors(path).metadata.get("licence", ""))


SOURCE = Source(
    read=read,
    outline=outline,
    locate=weight_file,
    own_size=own_size,
    check_weights=check_weights,
)
