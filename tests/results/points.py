"""Draw the scores of a grid's cells beside those of its teachers, on each set and over all of them.

python tests/results/points.py GRID FILE.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from promise import Grid, Scores

TEACHERS = ("#555555", "#aaaaaa", "#cccccc")
CELLS = ("#1f5fa8", "#c44e1a", "#3a8f4d", "#8a5fa8")


def draw(grid: Grid) -> Figure:
    """Means over seeds; a line is a deviation to both sides, and none is drawn for one seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    models = {f"teacher {name}": of for name, of in grid.teachers.items()} | grid.cells
    colours = [*TEACHERS[: len(grid.teachers)], *CELLS[: len(grid.cells)]]
    width = 0.8 / len(models)
    for at, ((name, scores), colour) in enumerate(zip(models.items(), colours, strict=True)):
        columns = columns_of(grid, scores)
        places = [i + (at - (len(models) - 1) / 2) * width for i in range(len(columns))]
        heights = [fmean(values) for values in columns]
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in columns]
        axes.errorbar(places, heights, spread, fmt="o", ms=5, capsize=2, label=name, color=colour)
        for place, height, above in zip(places, heights, spread, strict=True):
            axes.annotate(
                f"{height:.1f}",
                (place, height + above),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.set_xticks(range(len(grid.sets) + 1), [*grid.sets, "mean"])
    axes.margins(y=0.2)
    axes.set_ylabel("mean of kNN and linear probe, %")
    axes.legend(fontsize=8, ncols=len(models), loc="upper center")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def columns_of(grid: Grid, scores: Scores) -> list[list[float]]:
    """A model's scores of each seed, on each set and over all of them."""
    by_set = [[of[name] for of in scores.values()] for name in grid.sets]
    return [*by_set, grid.mean_over_sets(scores)]


if __name__ == "__main__":
    draw(Grid(Path(sys.argv[1]))).savefig(sys.argv[2], dpi=110)
