"""Fields with a help line, and checks whose errors name the option, the rule and the value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import Field, field, fields
from typing import Any, ClassVar, Protocol, TypeVar

from unic_ds.files.printable import printable

T = TypeVar("T")

MOST_PIXELS = 16384
"""The largest side of an image in pixels."""

WIDEST = 2**63 - 1
"""The largest whole number of any option: 64 bits."""

SHOWN = 60
"""Characters of a name or value from outside that a message shows."""


class Section(Protocol):
    """A dataclass of options."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def option(
    default: T,
    text: str,
    *,
    machinery: bool = False,
    most: float | None = None,
    choices: Sequence[str] = (),
) -> T:
    """Return a dataclass field with its help line and its largest value.

    `machinery` marks an option that may differ when a run is resumed. `choices` are its built-in
    values, if plugins may add others; those of a fixed set are in a Literal annotation.
    """
    metadata = {"help": text, "machinery": machinery, "most": most, "choices": tuple(choices)}
    return field(default=default, metadata=metadata)


class UnknownOption(ValueError):
    """A name that no option has."""


def refuse_unknown(names: Iterable[str], known: Sequence[str], remedy: str = "") -> None:
    """Raise UnknownOption for the first name that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            shown = printable(name, SHOWN)
            raise UnknownOption(f"unknown option --{shown}{nearest(shown, known)}{remedy}")


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def check(holds: bool, name: str, want: str, value: object) -> None:
    """Raise ValueError with the option's name, the rule and the value, unless the rule `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {want}, got {printable(repr(value))}")


def check_most(settings: Section, prefix: str) -> None:
    """Raise ValueError if a field of a dataclass exceeds its `most`, or 64 bits."""
    for f in fields(settings):
        value, most = getattr(settings, f.name), f.metadata.get("most")
        if type(value) in (int, float) and (most is not None or type(value) is int):
            most = WIDEST if most is None else most
            check(value <= most, f"{prefix}{f.name}", f"at most {most:,}", value)
