"""A run's result: a table for people, results.json for programs, a picture of both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from unic_ds.files import write_atomic
from unic_ds.files.printable import printable

Rows = Mapping[str, Mapping[str, float]]
"""Model -> evaluator -> accuracy in %, in the order of the table."""

Protocols = Mapping[str, Mapping[str, str]]
"""Model -> evaluator -> how the number was made."""

PROTOCOLS = "protocols.json"
TITLES = {"knn": "kNN %", "linear": "linear %"}

NEEDS = (
    "it needs class folders, two or more and some in common, and --data.val DIR or --data.val_share"
)
"""Why a run is not evaluated although --eval.on is true."""


class Score(NamedTuple):
    """One number of the table."""

    model: str
    name: str
    """Column of the table: the evaluator's name, or that and more if it yields several."""
    value: float
    protocol: str
    """All that another needs to know to get the same number: `knn k=10 T=0.07 cosine 224 px`."""


def render(
    rows: Rows, protocols: Protocols | None = None, title: str = "Frozen features, unseen images"
) -> str:
    """The table as plain text, and below it how its numbers were made, as far as it is known."""
    console = Console(width=100, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(table(rows, title))
    return capture.get() + "".join(f"{line}\n" for line in legend(protocols or {}))


def legend(protocols: Protocols) -> list[str]:
    """Each protocol once; with its models if others have another one for the same evaluator."""
    models: dict[tuple[str, str], list[str]] = {}
    for model, values in protocols.items():
        for name, protocol in values.items():
            models.setdefault((name, protocol), []).append(model)
    several = [name for name, _ in models]
    return [
        printable(f"{protocol}: {', '.join(of)}" if several.count(name) > 1 else protocol)
        for (name, protocol), of in sorted(
            models.items(), key=lambda item: several.index(item[0][0])
        )
    ]


def table(rows: Rows, title: str = "Frozen features, unseen images") -> Table:
    """The table for a rich console: a line per model, a column per evaluator (`-`: did not run)."""
    grid = Table(title=title, title_justify="left")
    grid.add_column("model")
    names = evaluators(rows)
    for name in names:
        grid.add_column(TITLES.get(name, name), justify="right")
    for model, values in rows.items():
        grid.add_row(model, *(f"{values[name]:.1f}" if name in values else "-" for name in names))
    return grid


def evaluators(rows: Rows) -> list[str]:
    """Names of the evaluators in the rows, in order of first appearance."""
    return list(dict.fromkeys(name for values in rows.values() for name in values))


def unevaluated(student: Path, *, on: bool) -> str:
    """The line in place of a table, for a run that ended without one; `on` is its --eval.on."""
    why = NEEDS if on else "--eval.on false"
    return f"finished; student in {str(student)!r}; it was not evaluated: {why}"


def tabulate(scores: Iterable[Score]) -> tuple[dict[str, dict[str, float]], Protocols]:
    """Scores as rows of the table, and their protocols."""
    rows: dict[str, dict[str, float]] = {}
    protocols: dict[str, dict[str, str]] = {}
    for score in scores:
        rows.setdefault(score.model, {})[score.name] = score.value
        protocols.setdefault(score.model, {})[score.name] = score.protocol
    return rows, protocols


def write(
    rows: Rows,
    folder: Path,
    log: Sequence[Mapping[str, Any]],
    protocols: Protocols | None = None,
) -> None:
    """Write `results.png`, `protocols.json`, then `results.json` (whole or not at all).

    `log` are the rows of the run's log.jsonl; those with a step and a loss are drawn.
    """
    curve = {row["step"]: row["loss"] for row in log if "step" in row and "loss" in row}
    plot(rows, sorted(curve.items()), folder / "results.png", title=folder.name)
    # A file of its own: every key of results.json is a model, also to older versions.
    if protocols:
        write_atomic(folder / PROTOCOLS, json.dumps(plain(protocols), indent=1))
    write_atomic(folder / "results.json", json.dumps(plain(rows), indent=1))


def plain(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A table as dictionaries."""
    return {model: dict(values) for model, values in table.items()}


def read(file: Path) -> dict[str, dict[str, float]]:
    """The rows of a `results.json`."""
    return json.loads(file.read_text())


def read_protocols(folder: Path) -> dict[str, dict[str, str]]:
    """Protocols of the numbers in a run's results.json; {} for a run of an older version."""
    file = folder / PROTOCOLS
    return json.loads(file.read_text()) if file.is_file() else {}


def plot(rows: Rows, curve: Sequence[tuple[int, float]], file: Path, title: str = "") -> Path:
    """Draw the loss curve and, right of it, each model's accuracies if there are any; the PNG."""
    from matplotlib.figure import (
        Figure,
    )  # heavy, and only drawing needs it; without pyplot it has no display

    figure = Figure(figsize=(12, 0.45 * len(rows) + 3), layout="constrained")
    left, *more = figure.subplots(1, 2, width_ratios=(2, 3)) if rows else [figure.subplots()]
    left.plot([step for step, _ in curve], [loss for _, loss in curve], color="C0")
    left.set(title="Distillation loss", xlabel="optimiser step", ylabel="loss")
    left.grid(alpha=0.3)
    for right in more:
        draw_bars(right, rows)
    figure.suptitle(printable(title), parse_math=False)
    figure.savefig(file, dpi=120)
    return file


def draw_bars(right: Any, rows: Rows) -> None:
    """Draw every model's accuracies on matplotlib's axes `right`."""
    names, models = evaluators(rows), list(rows)
    height = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        known = [i for i, model in enumerate(models) if name in rows[model]]
        at = [i + (place - (len(names) - 1) / 2) * height for i in known]
        bars = right.barh(
            at, [rows[models[i]][name] for i in known], height, label=TITLES.get(name, name)
        )
        right.bar_label(bars, fmt="%.1f", padding=3)
    right.set(
        title="Frozen features, unseen images",
        xlabel="accuracy in %",
        ylabel="model",
        xlim=(0, 110),
    )
    right.set_xticks(range(0, 101, 20))
    right.set_yticks(range(len(models)), models)
    right.invert_yaxis()  # the first row on top, as in the table
    if names:
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(names))
