"""The table of a comparison for people, and its picture."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unic_ds.evaluate.comparison import Comparison, Row
from unic_ds.files.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Frozen features, unseen images"
WIDTH = 100
"""Columns of a table that goes to a file."""
KNN = re.compile(r"\bknn\b")
"""The word, which is no part of a task's name."""

NEEDS = (
    "it needs class folders, two or more and some in common, and --data.val DIR or --data.val_share"
)
"""Why a run is not evaluated although --eval.on is true."""


def render(comparison: Comparison, *, width: int = WIDTH) -> str:
    """The table as plain text, and below it the average ranks and each protocol."""
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        show(comparison, console)
    return capture.get()


def print_to_terminal(comparison: Comparison) -> None:
    """Print the table as wide as the terminal, or as `WIDTH` columns if it goes elsewhere."""
    width = None if sys.stdout.isatty() else WIDTH
    show(comparison, Console(width=width, highlight=False))


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, the average ranks and the protocols."""
    console.print(grid(comparison))
    for line in (*rank_lines(comparison), *legend(comparison)):
        console.print(Text(line), soft_wrap=True)


def grid(comparison: Comparison) -> Table:
    """Rows of measures and columns of models for a rich console; the best of a row is bold.

    `-`: not measured. Each student has its difference to the best teacher of the row, and that in %
    of the teacher's value.
    """
    models = [name for name in comparison.roles if any(name in r.values for r in comparison.rows)]
    students = [name for name in comparison.named("student") if name in models]
    table = Table(title=TITLE, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in models:
        words = printable(name).split() or [""]
        table.add_column(Text(printable(name)), justify="right", min_width=max(map(len, words)))
    gains = students if comparison.named("teacher") else []
    for name in gains:
        owner = printable(name) if len(gains) > 1 else "student"
        table.add_column(Text(f"{owner} -\nbest teacher"), justify="right", no_wrap=True)
    for row in comparison.rows:
        best = row.best() if len(row.values) > 1 else []
        cells = [Text(text_of(row, name), style="bold" if name in best else "") for name in models]
        cells += [Text(gain_text(row, name, comparison)) for name in gains]
        table.add_row(Text(label(row)), *cells)
    return table


def label(row: Row) -> str:
    """Name and unit of a row."""
    return printable(f"{KNN.sub('kNN', row.name)} {row.unit}".rstrip())


def text_of(row: Row, model: str) -> str:
    """A value with as many digits as its unit needs; `-` if it was not measured."""
    if model not in row.values:
        return "-"
    value = row.values[model]
    return f"{value:.1f}" if row.unit == "%" or abs(value) >= 100 else f"{value:.3f}"


def gain_text(row: Row, student: str, comparison: Comparison) -> str:
    """The difference to the best teacher, and that in % of the teacher's value."""
    gain = row.gain(student, comparison.roles)
    relative = row.relative_gain(student, comparison.roles)
    if gain is None or not math.isfinite(gain):
        return "-"
    difference = f"{gain:+.1f}" if row.unit == "%" else f"{gain:+.3f}"
    return difference if relative is None else f"{difference} ({relative:+.1f} %)"


def rank_lines(comparison: Comparison) -> list[str]:
    """The average ranks as a line; none if fewer than two models can be ranked."""
    ranks, count = comparison.average_ranks()
    found = ", ".join(f"{printable(name)} {rank:.1f}" for name, rank in ranks.items())
    rows = "row" if count == 1 else "rows"
    return [f"average rank over {count} {rows} (1 is best): {found}"] if ranks else []


def legend(comparison: Comparison) -> list[str]:
    """Each protocol once; with its models if others have another one for the same row."""
    models: dict[tuple[str, str], list[str]] = {}
    for row in comparison.rows:
        for model, protocol in row.protocols.items():
            if protocol:
                models.setdefault((row.name, protocol), []).append(model)
    several = [name for name, _ in models]
    lines = [
        f"{protocol}: {', '.join(of)}" if several.count(name) > 1 else protocol
        for (name, protocol), of in models.items()
    ]
    return [printable(line) for line in dict.fromkeys(lines)]


def unevaluated(student: Path, *, on: bool) -> str:
    """The line in place of a table, for a run that ended without one; `on` is its --eval.on."""
    why = NEEDS if on else "--eval.on false"
    return f"finished; student in {str(student)!r}; it was not evaluated: {why}"


def plot(
    comparison: Comparison, log: Sequence[Mapping[str, Any]], file: Path, title: str = ""
) -> Path:
    """Draw the loss curve of log.jsonl's rows and, right of it, the measures in %; the PNG."""
    from matplotlib.figure import (
        Figure,
    )  # heavy, and only drawing needs it; without pyplot it has no display

    steps = {row["step"]: row["loss"] for row in log if "step" in row and "loss" in row}
    rows = [row for row in comparison.rows if row.unit == "%"]
    bars = sum(len(row.values) for row in rows)
    figure = Figure(figsize=(12, 0.22 * bars + 3), layout="constrained")
    left, *more = figure.subplots(1, 2, width_ratios=(2, 3)) if rows else [figure.subplots()]
    left.plot(*zip(*sorted(steps.items()), strict=True) if steps else ([], []), color="C0")
    left.set(title="Distillation loss", xlabel="optimiser step", ylabel="loss")
    left.grid(alpha=0.3)
    for right in more:
        draw_bars(right, rows, list(comparison.roles))
    figure.suptitle(printable(title), parse_math=False)
    figure.savefig(file, dpi=120)
    return file


def draw_bars(axes: Axes, rows: Sequence[Row], models: Sequence[str]) -> None:
    """Draw a group of bars for each row, a bar for each model."""
    height = 0.8 / max(len(models), 1)
    for place, model in enumerate(models):
        known = [i for i, row in enumerate(rows) if model in row.values]
        at = [i + (place - (len(models) - 1) / 2) * height for i in known]
        values = [rows[i].values[model] for i in known]
        bars = axes.barh(at, values, height, label=printable(model))
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set(title=TITLE, xlabel="%", xlim=(0, 110))
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks(range(len(rows)), [label(row).removesuffix(" %") for row in rows])
    axes.invert_yaxis()  # the first row on top, as in the table
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=min(len(models), 4))
