"""The picture of a comparison: heat maps of the pairs, spectra, and the selection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unic_ds.files.printable import printable
from unic_ds.tokens import KINDS

MAPS = {"cka": "linear CKA", "mutual_knn": "mutual kNN", "r2": "held-out R²: row from column"}
SHOWN = 16
"""Characters of a teacher's name."""


def draw(plain: Mapping[str, Any], stream: BinaryIO) -> None:
    """Draw a comparison, as `teacher_comparison.json` has it, as a PNG."""
    names = list(plain["teachers"])
    side = 1.6 + 0.55 * len(names)
    figure = Figure(figsize=(4 * max(side, 3), 2 * max(side, 3)), layout="constrained")
    for row, kind in zip(figure.subplots(len(KINDS), len(MAPS) + 1), KINDS, strict=True):
        for axes, measure in zip(row, MAPS, strict=False):
            draw_map(axes, names, matrix(plain["pairs"], names, kind, measure))
            axes.set_title(f"{kind}: {MAPS[measure]}", fontsize=9)
        draw_spectra(row[-1], plain["teachers"], kind)
    figure.savefig(stream, format="png", dpi=100)


def matrix(
    pairs: Sequence[Mapping[str, Any]], names: Sequence[str], kind: str, measure: str
) -> np.ndarray:
    """A measure of all pairs [T, T], 1 on the diagonal; NaN if it is not known."""
    value_TT = np.eye(len(names))
    for pair in pairs:
        if pair["kind"] != kind:
            continue
        i, j = names.index(pair["first"]), names.index(pair["second"])
        both = (
            (pair["r2_of_first"], pair["r2_of_second"])
            if measure == "r2"
            else (pair[measure], pair[measure])
        )
        value_TT[i, j], value_TT[j, i] = (math.nan if x is None else x for x in both)
    return value_TT


def draw_map(axes: Axes, names: Sequence[str], value_TT: np.ndarray) -> None:
    """Draw a matrix with its values from 0 (light) to 1 (dark)."""
    axes.imshow(value_TT, cmap="Blues", vmin=0, vmax=1)
    labels = [printable(name, SHOWN) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    for (i, j), value in np.ndenumerate(value_TT):
        colour = "white" if value > 0.6 else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)


def draw_spectra(axes: Axes, teachers: Mapping[str, Any], kind: str) -> None:
    """Draw the part of the variance that the first principal components of each teacher have."""
    for name, facts in teachers.items():
        found = facts["tokens"][kind]
        width, cumulative = found["width"], found["cumulative"]
        counts = [*(2**i for i in range(len(cumulative) - 1)), width]
        axes.plot(counts, cumulative, marker=".", label=printable(name, SHOWN))
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    axes.set_title(f"{kind}: variance of the first components", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
