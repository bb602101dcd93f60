"""The picture of a grid: a panel per measure, a dot per seed, the best teacher as a line."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from unic_ds.ablation.results import Measure, Results, finite, spread
from unic_ds.evaluate import table
from unic_ds.evaluate.comparison import Row
from unic_ds.files import open_atomic
from unic_ds.files.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "ablation.png"
PANELS, ACROSS = 12, 3
"""Measures that are drawn, and how many beside each other."""
CELLS, LABEL = 60, 40
"""Cells that are drawn, and characters of their names."""


def draw(results: Results) -> bytes:
    """The picture as PNG."""
    from matplotlib.figure import Figure  # heavy; without pyplot it has no display

    ranked = sorted(results.measures, key=lambda measure: not measure.better)
    measures = ranked[:PANELS]
    cells = results.cells[:CELLS]
    across = max(1, min(ACROSS, len(measures)))
    down = max(1, math.ceil(len(measures) / across))
    size = (4.2 * across + 1.5, down * (0.3 * len(cells) + 1.3))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False).flat
    for panel, measure in zip(axes, measures, strict=False):
        draw_panel(panel, measure, cells)
    for panel in list(axes)[len(measures) :]:
        panel.set_axis_off()
    if note := left_out(results):
        figure.supxlabel(note, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120, format="png")
    return stream.getvalue()


def left_out(results: Results) -> str:
    """Note on the cells and measures that the picture has no place for; empty if it has all."""
    counts = (("cells", len(results.cells), CELLS), ("measures", len(results.measures), PANELS))
    parts = [
        f"the first {most} of {count:,} {what}" for what, count, most in counts if count > most
    ]
    return f"{', '.join(parts)}; the table has all" if parts else ""


def draw_panel(axes: Axes, measure: Measure, cells: list[str]) -> None:
    """Draw the values of a measure: dots for seeds, a stroke for the mean."""
    for place, cell in enumerate(cells):
        values = finite(measure.values(cell))
        axes.plot(values, [place] * len(values), "o", color="C0", alpha=0.6, markersize=5)
        if found := spread(measure.values(cell)):
            axes.plot([found.mean], [place], "|", color="C1", markersize=16, markeredgewidth=2.5)
    best = measure.best_teacher()
    if best is not None:
        axes.axvline(best, color="C2", linestyle="--", linewidth=1.2, label="best teacher")
        axes.legend(loc="best", fontsize=8)
    label = table.label(Row(measure.name, measure.unit, measure.better))
    axes.set_title(label, fontsize=10, parse_math=False)
    axes.set_yticks(range(len(cells)), [printable(cell, LABEL) for cell in cells])
    axes.set_ylim(len(cells) - 0.5, -0.5)  # the first cell on top
    axes.grid(alpha=0.3)


def write(results: Results, png: bytes) -> None:
    """Write `ablation.png` atomically."""
    with open_atomic(results.study.out / FILE) as file:
        file.write(png)
