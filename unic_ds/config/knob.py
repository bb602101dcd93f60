"""A field with its help line, and checks that name the option, what it wants and what it got."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Any


def knob(default: Any, text: str, *, machinery: bool = False) -> Any:
    """A field with its help line; `machinery` marks what may differ when a run is resumed."""
    return field(default=default, metadata={"help": text, "machinery": machinery})


def check(holds: bool, name: str, want: str, value: object) -> None:
    """Raise ValueError naming the option, what it wants and what it got."""
    if not holds:
        raise ValueError(f"{name} must be {want}, got {value!r}")


def check_checkpoint(text: str, name: str) -> None:
    """Raise ValueError unless `text` says which blocks are recomputed."""
    known = text in ("none", "full") or re.fullmatch(r"every:[1-9]\d*", text)
    check(bool(known), name, "none, full or every:K as in every:2", text)


def check_rungs(text: str, name: str) -> None:
    """Raise ValueError unless `text` names student blocks."""
    known = text in ("all", "half", "middle", "last") or re.fullmatch(r"\d+(,\d+)*", text)
    check(bool(known), name, "all, half, middle, last or block numbers like 2,5,8,11", text)
