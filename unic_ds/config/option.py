"""A field with its help line, and checks that name the option, what it wants and what it got."""

from __future__ import annotations

import re
from dataclasses import field, fields
from typing import Any

from unic_ds.files.printable import printable

WIDEST = 2**63 - 1
"""The largest whole number of any option: 64 bits."""


def option(default: Any, text: str, *, machinery: bool = False, most: float | None = None) -> Any:
    """A field with its help line and its largest value, which lies far above what anybody needs.

    `machinery` marks what may differ when a run is resumed.
    """
    return field(default=default, metadata={"help": text, "machinery": machinery, "most": most})


def check(holds: bool, name: str, want: str, value: object) -> None:
    """Raise ValueError naming the option, what it wants and what it got."""
    if not holds:
        raise ValueError(f"{name} must be {want}, got {printable(repr(value))}")


def check_most(settings: Any, prefix: str) -> None:
    """Raise ValueError where a field of a dataclass exceeds its `most`, or 64 bits."""
    for f in fields(settings):
        value, most = getattr(settings, f.name), f.metadata.get("most")
        if type(value) in (int, float) and (most is not None or type(value) is int):
            most = WIDEST if most is None else most
            check(value <= most, f"{prefix}{f.name}", f"at most {most:,}", value)


def check_checkpoint(text: str, name: str) -> None:
    """Raise ValueError unless `text` says which blocks are recomputed."""
    known = text in ("none", "full") or re.fullmatch(r"every:[1-9]\d*", text)
    check(bool(known), name, "none, full or every:K as in every:2", text)


def check_rungs(text: str, name: str) -> None:
    """Raise ValueError unless `text` names student blocks."""
    known = text in ("all", "half", "middle", "last") or re.fullmatch(r"\d+(,\d+)*", text)
    check(bool(known), name, "all, half, middle, last or block numbers like 2,5,8,11", text)
