"""The table of a grid: rows for a terminal, for Markdown and for the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unic_ds.ablation.results import Measure, Results, Spread, spread
from unic_ds.evaluate import table
from unic_ds.evaluate.comparison import Comparison, Row
from unic_ds.files.printable import markdown, printable

WIDTH = 120
"""Columns of a table that goes to a file."""


@dataclass(frozen=True)
class Line:
    """A cell or a teacher by one measure, in words."""

    name: str
    seeds: str
    value: str
    difference: str
    gain: str
    best: bool = False
    """True if no cell has a better mean over the same seeds."""


@dataclass(frozen=True)
class Block:
    """All cells and teachers by one measure."""

    title: str
    lines: Sequence[Line]


def columns(results: Results) -> list[str]:
    """Titles of the columns."""
    others = others_of(results)
    name = next(iter(others), "baseline")
    other = "compared" if len(others) > 1 else printable(name)
    value = "mean +- std" if several_seeds(results) else "value"
    return ["measure", "cell", "seeds", value, f"- {other}", "- best teacher"]


def several_seeds(results: Results) -> bool:
    """True if a cell has values of several seeds."""
    return any(len(results.seeds_of(cell)) > 1 for cell in results.cells)


def blocks(results: Results) -> list[Block]:
    """A block for each measure, and one for the average ranks over several measures."""
    several = len(others_of(results)) > 1
    found = [
        Block(
            table.label(Row(m.name, m.unit, m.better)), measure_lines(results, m, several=several)
        )
        for m in results.measures
    ]
    ranks, count = results.ranks()
    if count > 1:
        best = min(ranks.values())
        rank = [Line(n, "", f"{rank:.1f}", "", "", rank == best) for n, rank in ranks.items()]
        found.append(Block("average rank", rank))
    return found


def measure_lines(results: Results, measure: Measure, *, several: bool) -> list[Line]:
    """The cells, then the teachers, by one measure; `several` if cells have other baselines."""
    best = set(measure.best(results.cells))
    lines = []
    for cell in results.cells:
        found, other = spread(measure.values(cell)), results.study.compared_with(cell)
        difference = text_of(spread(results.differences(measure, cell)), measure, signed=True)
        named = several and bool(other) and difference != "-"
        lines.append(
            Line(
                cell,
                str(found.count if found else 0),
                text_of(found, measure),
                f"{difference} ({other})" if named else difference,
                text_of(spread(measure.gains(cell)), measure, signed=True),
                cell in best,
            )
        )
    for name in results.teachers:
        if found := spread(measure.values(name)):
            lines.append(Line(f"teacher {name}", str(found.count), text_of(found, measure), "", ""))
    return lines


def others_of(results: Results) -> set[str]:
    """The cells that some cell is compared with."""
    return {results.study.compared_with(cell) for cell in results.cells} - {""}


def text_of(found: Spread | None, measure: Measure, *, signed: bool = False) -> str:
    """Mean and deviation with the digits of the unit; no deviation for one seed."""
    if found is None:
        return "-"
    digits = 1 if measure.unit == "%" or (abs(found.mean) >= 100 and not signed) else 3
    middle = f"{found.mean:{'+' if signed else ''}.{digits}f}"
    return middle if found.std is None else f"{middle} +- {found.std:.{digits}f}"


def notes(results: Results) -> list[str]:
    """Lines below the table: signs, protocols, runs without a student."""
    lines = []
    if any(found.better == "lower" for found in results.measures):
        lines.append("differences are positive if the cell is better, also where less is better")
    if several_seeds(results):
        lines.append("+-: sample standard deviation over seeds; differences are taken seed by seed")
    if (count := results.ranks()[1]) > 1:
        lines.append(f"average rank of a cell's means over {count} measures, 1 is best")
    if names := results.incomplete():
        lines.append(
            "without a finite value of every seed, and neither best nor ranked by such a measure:"
            f" {', '.join(map(printable, names))}"
        )
    rows = (row for measure in results.measures for row in measure.rows.values())
    lines += dict.fromkeys(line for row in rows for line in table.legend(Comparison({}, [row])))
    lines += [
        f"seed {seed}: not evaluated, or with other students or settings; the same command, or"
        " --collect true, evaluates it"
        for seed in results.not_evaluated
    ]
    return lines + [f"without a student: {printable(run.describe())}" for run in results.unfinished]


def print_to_terminal(results: Results) -> None:
    """Print the table as wide as the terminal, or as `WIDTH` columns if it goes elsewhere."""
    width = None if sys.stdout.isatty() else WIDTH
    show(results, Console(width=width, highlight=False))


def show(results: Results, console: Console) -> None:
    """Print the table and its notes; the best cells are bold."""
    grid = Table(title="Ablation: students on unseen images", title_justify="left")
    for i, name in enumerate(columns(results)):
        grid.add_column(Text(name), justify="left" if i < 2 else "right", no_wrap=i == 3)
    for block in blocks(results):
        for i, line in enumerate(block.lines):
            style = "bold" if line.best else ""
            texts = [line.name, line.seeds, line.value, line.difference, line.gain]
            cells = [Text(printable(text), style=style) for text in texts]
            grid.add_row(Text(printable(block.title) if i == 0 else ""), *cells)
        grid.add_section()
    console.print(grid)
    for note in notes(results):
        console.print(Text(note), soft_wrap=True)


def as_markdown(results: Results) -> str:
    """The table and its notes in Markdown."""
    names = columns(results)
    rows = [f"| {' | '.join(map(markdown, names))} |", f"|{'---|' * len(names)}"]
    for block in blocks(results):
        for line in block.lines:
            value = f"**{markdown(line.value)}**" if line.best else markdown(line.value)
            texts = [block.title, line.name, line.seeds]
            after = [value, markdown(line.difference), markdown(line.gain)]
            rows.append(f"| {' | '.join([*map(markdown, texts), *after])} |")
    return "\n".join([*rows, "", *(f"- {markdown(note)}" for note in notes(results))]) + "\n"
