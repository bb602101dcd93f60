"""Builds models of timm and open_clip, and checks the options of a row that all kinds share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from unic_ds import config
from unic_ds.teachers.probe import first_line

Model = TypeVar("Model")


def build(row: config.Teacher, create: Callable[..., Model], arch: str, **options: object) -> Model:
    """A model of timm or open_clip; ValueError if the library refuses its name or its options."""
    try:
        with quiet():
            return create(arch, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # either library raises anything from KeyError to AssertionError
        given = "".join(f", {key} {value}" for key, value in options.items() if key != "device")
        library = create.__module__.partition(".")[0]
        raise ValueError(
            f"teacher {row.name!r}: {library} cannot build {arch}{given} ({first_line(exc)})"
        ) from exc


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what open_clip warns of a model without weights, which is what is wanted."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def check_patch(row: config.Teacher, own: int, kind: str) -> None:
    """ValueError if a row changes the patch size of a model that is fixed to `own` (0: no ViT)."""
    if row.patch not in (0, own):
        want = f"0 or its own {own}" if own else "0"
        why = "cannot change them" if own else "is no ViT"
        raise ValueError(f"teachers.{row.name}.patch must be {want}, got {row.patch}: {kind} {why}")


def vit_size(row: config.Teacher, grid: int, patch: int, own: int = 0) -> int:
    """The image side of a ViT: the row's, or what makes the grids agree (method: section 1).

    If its map is resized instead, the side `own` of the images that it was trained on, if known.
    """
    agreeing = row.resize == "image" or not own
    size = row.size or (grid * patch if agreeing else own)
    if size % patch:
        raise ValueError(
            f"teachers.{row.name}.size must be a multiple of its patch {patch}, got {size}"
        )
    return size


def block_of(row: config.Teacher, count: int) -> int:
    """The block (or stage) that tokens are read after, -1 for the output.

    ValueError if a model of `count` blocks does not have it.
    """
    if row.block == "output":
        return -1
    block = (count - 1) // 2 if row.block == "middle" else int(row.block)
    if not 0 <= block < count:
        want = f"output, middle or below {count}" if count else "output for this kind of model"
        raise ValueError(f"teachers.{row.name}.block must be {want}, got {row.block}")
    return block
