"""Text of --help from dataclasses of options; argparse lays it out and parses nothing."""

from __future__ import annotations

import argparse
import shutil
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from unic_ds.config import Config, Teacher
from unic_ds.config.overrides import OPTION_ALIASES

SCIENCE = "science", "decides the result: a checkpoint resumes with the same values only"
MACHINERY = "machinery", "may differ when a run is resumed"
WIDEST, COLUMN = 100, 32
"""Most columns of the text, and the column in which explanations begin."""


class Row(NamedTuple):
    """An option, a positional argument or a verb, and its explanation."""

    name: str
    value: str  # its type, or its legal words joined by |
    text: str


class Section(NamedTuple):
    """Rows under a title."""

    title: str
    description: str
    rows: Sequence[Row]


def render(usage: str, summary: str, sections: Sequence[Section], end: str = "") -> str:
    """Return the text, wrapped to the terminal's width."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    layout = partial(argparse.HelpFormatter, max_help_position=COLUMN, width=width)
    parser = argparse.ArgumentParser(
        usage=escape(usage),
        description=escape(summary),
        epilog=escape(end),
        add_help=False,
        formatter_class=layout,
    )
    for section in sections:
        group = parser.add_argument_group(section.title, escape(section.description) or None)
        for row in section.rows:
            group.add_argument(row.name, metavar=row.value or row.name, help=escape(row.text))
    return parser.format_help().rstrip("\n")


def escape(text: str) -> str:
    """Text with `%` escaped for argparse."""
    return text.replace("%", "%%")


def option_rows(settings: type, prefix: str = "") -> Iterator[tuple[Row, bool]]:
    """Yield (row, True if it is machinery) for each field of a dataclass that has a help line."""
    hints = get_type_hints(settings)
    for f in fields(settings):
        if "help" in f.metadata:
            name = OPTION_ALIASES.get(prefix + f.name, prefix + f.name)
            text = " ".join(filter(None, (f.metadata["help"], shown_default(f.default))))
            values = "|".join(f.metadata["choices"]) or legal_values(hints[f.name])
            yield Row(f"--{name}", values, text), f.metadata["machinery"]


def shown_default(default: object) -> str:
    """A default in brackets; nothing for one that is empty."""
    if default is None or default is MISSING or default in ("", ()):
        return ""
    if isinstance(default, bool):
        return f"[{str(default).lower()}]"
    if isinstance(default, tuple):
        return f"[{','.join(map(str, default))}]"
    return f"[{default:.6g}]" if isinstance(default, float) else f"[{default}]"


def legal_values(annotation: Any) -> str:
    """The type of an option's value, or all of its legal words."""
    origin, of = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(word or "''" for word in of)
    if origin in (Union, types.UnionType):
        return legal_values(next(a for a in of if a is not type(None)))
    if origin is tuple:
        return f"{legal_values(of[0])},..."
    return {bool: "[true|false]", int: "INT", float: "FLOAT", Teacher: "SOURCE"}.get(
        annotation, "TEXT"
    )


def run_sections(besides: Collection[str] = ()) -> list[Section]:
    """Every option of a run: those that decide its result, then the machinery.

    Options in `besides`, which a verb declares itself, are left out.
    """
    hidden = {*besides, "--recipe", "--teachers.NAME.name"}
    parts: list[tuple[str, str, type]] = [("", "", Config)]
    for f in fields(Config):
        if is_dataclass(f.default):
            parts.append((f.name, docstring(type(f.default)), type(f.default)))
    parts.insert(1, ("teachers.NAME", docstring(Teacher), Teacher))
    sections = []
    for machinery, (kind, meaning) in enumerate((SCIENCE, MACHINERY)):
        for name, description, settings in parts:
            found = option_rows(settings, f"{name}." if name else "")
            rows = [
                row
                for row, belongs in found
                if belongs == bool(machinery) and row.name not in hidden
            ]
            if rows and name:
                sections.append(Section(f"{kind}: {name}", description, rows))
            elif rows:
                sections.append(Section(kind, meaning, rows))
    return sections


def docstring(settings: type) -> str:
    """The first line of a dataclass's docstring."""
    return (settings.__doc__ or "").split("\n")[0]
