"""Draw what limits a student: cells of results.yaml, each beside others that differ in one way.

python tests/results/curves.py GRID FILE.png
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from promise import Grid

from unic_ds.config import recipes
from unic_ds.config.data_spec import parts

FROM_WEIGHTS = "from-dinov2"
"""The cells that start from a teacher's weights: points beside the curves."""
BYTES = 4
"""Of a parameter."""


class Curve(NamedTuple):
    """A panel: cells by a number that is known of their runs."""

    title: str
    axis: str
    number: Callable[[Path], float]
    cells: tuple[str, ...]


def epochs(run: Path) -> float:
    """Passes over the training images."""
    return recipes.read(run / "config.yaml").optim.epochs


def images(run: Path) -> float:
    """Training images, of a list."""
    (part,) = parts(recipes.read(run / "config.yaml").data.train)
    return len(part.path.read_text().splitlines())


def parameters(run: Path) -> float:
    """Parameters of the student, in millions."""
    return (run / "student" / "model.safetensors").stat().st_size / BYTES / 1e6


CURVES = (
    Curve("steps", "epochs", epochs, ("epochs-1", "baseline", "epochs-4", "epochs-8")),
    Curve(
        "images, as many steps",
        "training images",
        images,
        ("sixteenth", "quarter", "baseline", "more"),
    ),
    Curve(
        "capacity, as many steps",
        "million parameters",
        parameters,
        ("baseline", "tiny", FROM_WEIGHTS),
    ),
)


def draw(folder: Path) -> Figure:
    """The mean of kNN and linear accuracy over the sets, of each cell and teacher."""
    grid, figure = Grid(folder), Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(CURVES), sharey=True)
    for panel, curve in zip(panels, CURVES, strict=True):
        names = [name for name in curve.cells if name in grid.cells]
        seed = next(iter(grid.cells[names[0]]))
        points = {
            name: (curve.number(folder / name / f"seed{seed}"), mean_of(grid, name))
            for name in names
        }
        draw_panel(panel, curve, points, grid)
    panels[0].set_ylabel("mean of kNN and linear probe, %")
    panels[-1].legend(fontsize=8)
    return figure


def mean_of(grid: Grid, cell: str) -> float:
    """The mean over sets and seeds."""
    return fmean(grid.mean_over_sets(grid.cells[cell]))


def draw_panel(
    panel: Axes, curve: Curve, points: dict[str, tuple[float, float]], grid: Grid
) -> None:
    """A curve, the cells beside it, and the teachers as lines."""
    line = [point for name, point in points.items() if not name.startswith(FROM_WEIGHTS)]
    panel.plot(*zip(*line, strict=True), "o-", color="#1f5fa8", label="student, random start")
    for name, point in points.items():
        if name.startswith(FROM_WEIGHTS):
            panel.plot(*point, "D", color="#c44e1a", label="student from a teacher's weights")
    for (name, scores), style in zip(grid.teachers.items(), ("--", ":"), strict=False):
        mean = fmean(grid.mean_over_sets(scores))
        panel.axhline(mean, color="#555555", ls=style, label=f"teacher {name}")
    panel.set_xscale("log")
    ticks = sorted({x for x, _ in points.values()})
    panel.set_xticks(ticks, [f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in ticks])
    panel.minorticks_off()
    panel.set_title(curve.title)
    panel.set_xlabel(curve.axis)
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    draw(Path(sys.argv[1])).savefig(sys.argv[2], dpi=110)
