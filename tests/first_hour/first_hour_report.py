"""The first hour's table: on the terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unic_ds.files.printable import markdown, printable

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
WAITS, LATE = "waits for a GPU", "not run"
STYLE = {PASSED: "green", FAILED: "bold red", SKIPPED: "yellow", WAITS: "yellow", LATE: "magenta"}
COLUMNS = ("check", "result", "s", "figure", "planner or expected", "reason")
WIDE = 160
"""Characters of the table where it is no terminal that takes it."""
TAIL = 40
"""Last lines of a check's output that the JSON keeps."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Outcome of a check."""

    check: str
    result: str
    seconds: float = 0.0
    figure: str = ""
    expected: str = ""
    reason: str = ""
    commands: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)

    @property
    def cells(self) -> tuple[str, ...]:
        """Its cells, in the order of the columns."""
        seconds = f"{self.seconds:.0f}" if self.seconds else ""
        return (self.check, self.result, seconds, self.figure, self.expected, self.reason)


def tail_of(output: str) -> list[str]:
    """The last lines of an output, as visible characters."""
    return [printable(line) for line in output.splitlines()[-TAIL:]]


def command_line(words: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(words)


def summary(rows: Sequence[Row]) -> str:
    """Numbers of checks that passed, failed and so on, in words."""
    count = Counter(row.result for row in rows)
    return ", ".join(f"{count[result]} {result}" for result in STYLE if count[result])


def write(rows: Sequence[Row], machine: dict[str, Any], notes: Sequence[str], out: Path) -> None:
    """Write first_hour.json and first_hour.md."""
    found = {"machine": machine, "notes": list(notes), "rows": [asdict(row) for row in rows]}
    (out / "first_hour.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "first_hour.md").write_text(page(rows, machine, notes))


def page(rows: Sequence[Row], machine: dict[str, Any], notes: Sequence[str]) -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(map(markdown, row.cells))} |" for row in rows]
    lines += ["", f"{summary(rows)}.", ""]
    lines += [f"{name}: {markdown(value)}  " for name, value in described(machine).items()]
    lines += ["", *(markdown(note) for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def described(machine: dict[str, Any]) -> dict[str, str]:
    """The machine in a few lines."""
    gpus = Counter(gpu["name"] for gpu in machine["gpus"])
    smi = machine["nvidia_smi"][0] if machine["nvidia_smi"] else {}
    versions = machine["versions"] | {"python": machine["python"]}
    versions |= {name: machine[name] for name in ("cuda", "nccl") if machine[name]}
    return {
        "GPU": ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "none",
        "driver": ", ".join(f"{name} {value}" for name, value in smi.items()) or "none",
        "CPU": f"{machine['cpu']}, {machine['cores']} cores",
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "commit": f"{machine['commit']}, {machine['date']}",
    }


def show(rows: Sequence[Row], machine: dict[str, Any], notes: Sequence[str]) -> None:
    """Print the table, plainly where rich is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        show_plain(rows)
    else:
        grid = Table(*COLUMNS, show_lines=False)
        for row in rows:
            style = ("", STYLE[row.result], "", "", "", "")
            cells = zip(map(printable, row.cells), style, strict=True)
            grid.add_row(*(Text(text, style=own) for text, own in cells))
        Console(width=None if sys.stdout.isatty() else WIDE).print(grid)
    print(f"{summary(rows)}.")
    for name, value in described(machine).items():
        print(printable(f"{name}: {value}"))
    for note in notes:
        print(printable(note))


def show_plain(rows: Sequence[Row]) -> None:
    """Print a line for each row, columns under each other but for the last."""
    cells = [COLUMNS, *(tuple(map(printable, row.cells)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        words = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("  ".join(words).rstrip())
