"""Table of a student's forms in Markdown, which a terminal shows as well as a page."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unic_ds.evaluate.fidelity import MOST
from unic_ds.files.printable import printable
from unic_ds.tokens import KINDS
from unic_ds.weights.formats.folder import Labelled, knn
from unic_ds.weights.formats.forms import BATCHES, Measures

WIDEST = 10_000
"""Columns of the console that measures the table."""


def render(
    found: Sequence[Measures], *, labelled: Labelled | None, threads: int, notes: Sequence[str]
) -> str:
    """The table, a row for each form after the student's, and sentences on how it was measured.

    `labelled` has the labels of the images, if they have some; `notes` are on the images.
    """
    table = Table(box=MARKDOWN)
    for i, title in enumerate(HEADER):
        table.add_column(title, justify="left" if i < 2 else "right", no_wrap=True)
    for row in found:
        # A `|` in a folder's name would end a cell of Markdown.
        cells = cells_of(row, found[0], labelled)
        table.add_row(*(Text(printable(cell).replace("|", "\\|")) for cell in cells))
    console = Console(width=WIDEST, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.strip() for line in capture.get().splitlines()]
    rounds = len(found[0].seconds[BATCHES[0]])
    used = "1 thread" if threads == 1 else f"{threads} threads"
    below = [
        f"ms: images to tokens, median of {rounds} rounds over all forms with {used} on {cpu()};"
        " in brackets the median of its ratios to the student",
        f"versions: {', '.join(versions(found))}",
        *notes,
        *remarks(found),
    ]
    return "\n".join([*filter(None, lines), "", *below])


HEADER = (
    *("form", "format", "MB"),
    *(f"ms, batch of {count}" for count in BATCHES),
    "kNN %",
    *(f"cosine {kind}" for kind in KINDS),
    *(f"fidelity {kind}" for kind in KINDS),
)


def cells_of(row: Measures, student: Measures, labelled: Labelled | None) -> list[str]:
    """Texts of a form's row; those of the student itself have no comparison."""
    own = row is student
    cells = [row.form.name, row.form.format.title, f"{row.form.megabytes:.2f}"]
    for count in BATCHES:
        text, pairs = (
            f"{1e3 * median(row.seconds[count]):.1f}",
            zip(row.seconds[count], student.seconds[count], strict=True),
        )
        ratio = median(ours / theirs for ours, theirs in pairs)
        cells.append(text if own else f"{text} ({ratio:.2f})")
    cells.append(f"{knn(row.cls, labelled):.1f}" if labelled else "")
    for measure in ("cosine", "fidelity"):
        for kind in KINDS:
            sums = None if own else row.agreement.get(kind)
            cells.append(text_of(measure, sums.measures()[measure]) if sums else "")
    return cells


def text_of(measure: str, value: float) -> str:
    """A measure of agreement as text."""
    if measure == "cosine":
        return f"{value:.5f}"
    if value >= MOST:
        return f"> {MOST:,.0f}"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def remarks(found: Sequence[Measures]) -> list[str]:
    """Sentences on forms that do something else than the student."""
    lines = []
    for row in found:
        name = printable(row.form.name)
        if row.more:
            kept = printable(", ".join(row.more))
            lines.append(f"{name} computes {kept} too, which count in its size and its time")
        if row.form.size != found[0].form.size:
            sides = f"{row.form.size} px, the student takes {found[0].form.size} px"
            lines.append(f"{name} takes images of {sides}")
        if row.form.format.title == "transformers":
            lines.append(f"{name}: the time of its image processor counts")
    return lines


def versions(found: Sequence[Measures]) -> list[str]:
    """Packages that ran the forms, with their versions."""
    names = dict.fromkeys(["torch", *(row.form.format.title for row in found)])
    texts = []
    for name in names:
        try:
            texts.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # torch.export is a module of torch
            continue
    return texts


def cpu() -> str:
    """Name of the CPU, and the cores that this process may use."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cores()} cores of {printable(names[0] if names else platform.machine())}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
