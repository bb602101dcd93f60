"""Plugins: Python modules that add names to the registries, and the names that a Config may use.

A registry is a dict from a name to a function or class. A plugin adds to it when it is imported:

    RECIPES, METHODS    config.recipes, config.methods     light: known before torch is imported
    SOURCES             teachers.sources                   kinds of teacher source
    TERMS               losses.terms                       terms of the loss
    BALANCERS           losses.balance                     values of --balance.kind
    EVALUATORS          evaluate.registry                  rows of the table

The last four import torch, so a Config without plugins is checked against `BUILT_IN`; one with
plugins is checked against the registries themselves, once they are loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unic_ds.config import loss_terms
from unic_ds.config.evaluation import TASKS
from unic_ds.config.objective import BALANCERS
from unic_ds.config.option import nearest
from unic_ds.config.teacher_source import GRAMMAR
from unic_ds.files.printable import printable

if TYPE_CHECKING:
    from unic_ds.config import Config


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names in the registries."""

    sources: Collection[str]
    terms: Collection[str]
    balancers: Collection[str]
    tasks: Collection[str]


BUILT_IN = Names(
    sources=tuple(GRAMMAR),
    terms=loss_terms.TERMS,
    balancers=BALANCERS,
    tasks=TASKS,
)
"""Names that are known before torch is imported."""


def load(modules: Iterable[str]) -> None:
    """Import the plugins; ValueError for one that cannot be found."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--plugins: cannot import {printable(name)!r} ({printable(error)}); put its folder"
                " on PYTHONPATH"
            ) from error


def check_names(cfg: Config, known: Names = BUILT_IN) -> None:
    """Raise ValueError, with the nearest known name, for a name that no registry has."""
    for row in cfg.teachers:
        kinds = [f"{kind}:" for kind in known.sources]
        check_name(row.parsed_source.kind + ":", kinds, f"teachers.{row.name}.source's kind")
    distances = {"loss.{}": cfg.loss.distance}
    distances |= {f"teachers.{name}.{{}}_loss": found for name, found in cfg.distances.items()}
    for option, distance in distances.items():
        for kind, terms in zip(distance._fields, distance, strict=True):
            for term in terms:
                check_name(term, known.terms, f"a term of {option.format(kind)}")
    check_name(cfg.balance.kind, known.balancers, "balance.kind")
    for task in cfg.eval.tasks:
        check_name(task, known.tasks, "eval.tasks")


def check_name(name: str, known: Collection[str], option: str) -> None:
    """Raise ValueError, with the nearest known name, for a name that is not known."""
    if name not in known:
        raise ValueError(
            f"{option} must be one of {', '.join(known)}, got"
            f" {printable(repr(name))}{nearest(name, known)}; --plugins MODULE may add others"
        )
