"""Teachers from the user's own code: `python:MODULE:FUNCTION`, a function that returns a module."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable

import torch
from torch import nn

from unic_ds import config
from unic_ds.files.printable import printable
from unic_ds.teachers.adapters import PythonTower, TeacherModel
from unic_ds.teachers.probe import first_line, place
from unic_ds.teachers.sources.build import block_of
from unic_ds.teachers.sources.contract import Source

OPTION = {"image_size": "size", "patch_size": "patch"}
"""A module's attribute -> the option of a row that overrides it."""


def read(row: config.Teacher, grid: int) -> TeacherModel:
    """The module that the user's function returns.

    Its forward maps normalised images [B, 3, size, size] to Tokens. Its attributes image_size,
    patch_size, mean and std count if the row does not set them; an image_size overrides the
    grid's, since a user's module may take no other. ValueError for what cannot be used.
    """
    block_of(row, 0)  # it returns its own tokens: there is no block to choose
    model = call_python(row)
    patch = row.patch or side(row, model, "patch_size")
    own = row.size or side(row, model, "image_size")
    if not own and row.resize != "image":
        raise ValueError(
            f"teachers.{row.name}.resize {row.resize!r} needs the native side of {row.source},"
            f" which does not say its image_size; set teachers.{row.name}.size"
        )
    size = own or grid * patch
    mean, std = (getattr(row, key) or three(row, model, key) for key in ("mean", "std"))
    for key, value in {"size": size, "mean": mean, "std": std}.items():
        if not value:
            raise ValueError(
                f"teacher {row.name!r} ({row.source}) does not say its {key}; "
                f"set teachers.{row.name}.{key}"
            )
    licence = getattr(model, "licence", "") or ""
    return TeacherModel(PythonTower(model), size, patch, mean, std, printable(licence))


def side(row: config.Teacher, model: nn.Module, key: str) -> int:
    """An attribute that is a side in pixels, or a pair of equal ones; 0 without it.

    ValueError for anything else.
    """
    value = getattr(model, key, None)
    if value is None:
        return 0
    try:
        pair = tuple(value) if hasattr(value, "__len__") else (value,)
        sides = {operator.index(part) for part in pair}
    except TypeError:
        sides = set()
    if len(sides) != 1 or min(sides) < 0:
        raise ValueError(
            f"teacher {row.name!r}: {key} must be pixels or a pair of equal sides, got"
            f" {printable(repr(value), 60)}; set teachers.{row.name}.{OPTION[key]}"
        )
    return sides.pop()


def three(row: config.Teacher, model: nn.Module, key: str) -> tuple[float, ...]:
    """An attribute that is three numbers, in any container; () without it.

    ValueError for anything else.
    """
    value = getattr(model, key, None)
    if value is None:
        return ()
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).detach().flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        numbers = []
    if len(numbers) != 3:
        raise ValueError(
            f"teacher {row.name!r}: {key} must be three numbers, got"
            f" {printable(repr(value), 60)}; set teachers.{row.name}.{key}"
        )
    return tuple(numbers)


def call_python(row: config.Teacher) -> nn.Module:
    """The module of a `python:` source's function; ValueError if there is none or it fails."""
    where, name = row.parsed_source.module, row.parsed_source.function
    try:
        make: Callable[[], object] | None = getattr(importlib.import_module(where), name, None)
    except ImportError as exc:
        raise ValueError(
            f"teacher {row.name!r}: cannot import {where!r} ({exc}); put its folder on PYTHONPATH"
        ) from exc
    except Exception as exc:  # the module's own code
        raise ValueError(
            f"teacher {row.name!r}: importing {where!r} fails: {first_line(exc)}"
        ) from exc
    if not callable(make):
        raise ValueError(f"teacher {row.name!r}: module {where!r} has no function {name!r}")
    try:
        model = make()
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:
        raise ValueError(
            f"teacher {row.name!r}: {where}:{name}() fails: {first_line(exc)} ({place(exc)})"
        ) from exc
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"teacher {row.name!r}: {where}:{name} must return a torch module, "
            f"got {type(model).__name__}"
        )
    return model


SOURCE = Source(read=read)
