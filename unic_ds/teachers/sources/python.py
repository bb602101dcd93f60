"""Builds the teacher of a `python:MODULE:FUNCTION` source and reads what its module says."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unic_ds import config
from unic_ds.files.printable import printable
from unic_ds.teachers.adapters import PythonTower, Source
from unic_ds.teachers.probe import first_line, place

OPTION = {"image_size": "size", "patch_size": "patch"}
"""The option of a row that goes before a module's attribute."""


def from_python(row: config.Teacher, grid: int) -> Source:
    """`python:MODULE:FUNCTION`: the module that the user's function makes.

    Its forward maps normalised images [B, 3, size, size] to Tokens. Its attributes image_size,
    patch_size, mean and std count where the row leaves them open; an image_size goes before the
    grid's, since a user's module may take no other. ValueError for what cannot be used.
    """
    model = call_python(row)
    patch = row.patch or side(row, model, "patch_size")
    size = row.size or side(row, model, "image_size") or grid * patch
    mean, std = (getattr(row, key) or three(row, model, key) for key in ("mean", "std"))
    for key, value in {"size": size, "mean": mean, "std": std}.items():
        if not value:
            raise ValueError(
                f"teacher {row.name!r} ({row.source}) does not say its {key}; "
                f"set teachers.{row.name}.{key}"
            )
    licence = getattr(model, "licence", "") or ""
    return Source(PythonTower(model), size, patch, mean, std, printable(licence))


def side(row: config.Teacher, model: nn.Module, key: str) -> int:
    """An attribute that is a side in pixels, or a pair of equal ones; 0 without it.

    ValueError for anything else.
    """
    value: Any = getattr(model, key, None)
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
    value: Any = getattr(model, key, None)
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
    where, _, name = row.source.removeprefix("python:").partition(":")
    try:
        make: Callable[[], Any] | None = getattr(importlib.import_module(where), name, None)
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
