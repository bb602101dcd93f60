"""Pages of docs/reference from the code: `python -m unic_ds.cli.reference_pages docs/reference`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from unic_ds import cli
from unic_ds.config import help_text

SETTINGS = """# Settings

Each is an option of `unic-ds train` and of every verb that takes a recipe, and a key of a recipe's
`.yaml` file. *Science* decides the result: a checkpoint resumes with the same values only.
*Machinery* may differ when a run is resumed.
"""
COMMANDS = """# Commands

`unic-ds VERB --help` prints the same in a terminal. Verbs that take a recipe or a training command
also take [the settings of a run](settings.md).
"""
TAKES = {"nothing": "", "recipe": " It takes a recipe.", "job": " It takes a training command."}


def pages() -> dict[str, str]:
    """The pages by the names of their files."""
    return {"settings.md": settings(), "commands.md": commands()}


def settings() -> str:
    """The settings of a run."""
    parts = [part for section in help_text.run_sections() for part in section_lines(section)]
    return "\n".join([SETTINGS, *parts])


def commands() -> str:
    """The verbs of `unic-ds`."""
    lines = [COMMANDS]
    for name, module in cli.VERBS.items():
        verb = module.VERB
        summary = f"{verb.summary[0].upper()}{verb.summary[1:]}.{TAKES[verb.takes]}"
        lines += [f"## unic-ds {name}", plain(summary), "```", verb.command_line(), "```", ""]
        for section in verb.sections():
            lines += [f"**{section.title}**", "", *table(section.rows)]
    return "\n".join(lines)


def section_lines(section: help_text.Section) -> list[str]:
    """A section with a heading."""
    return [f"## {section.title}", plain(section.description), "", *table(section.rows)]


def table(rows: Iterable[help_text.Row]) -> list[str]:
    """Rows as a table, and an empty line."""
    head = ["| name | values | meaning |", "|---|---|---|"]
    body = [f"| `{row.name}` | {values(row.value)} | {plain(row.text)} |" for row in rows]
    return [*head, *body, ""]


def values(text: str) -> str:
    """The type of a value, or its legal words, each as code."""
    words = re.sub(r"^\[(.*)\]$", r"\1", text).split("|") if text else []
    return " ".join(f"`{word}`" for word in words)


def plain(text: str) -> str:
    """Text in which no character is markup."""
    escaped = re.sub(r"([\\`*_{}\[\]|])", r"\\\1", text)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    for name, text in pages().items():
        (Path(sys.argv[1]) / name).write_text(text)
