"""Lines and progress bars that rank 0 prints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def first_rank() -> bool:
    """True on rank 0, and if no launcher started this process."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """A line from rank 0 to whoever watches."""
    if first_rank():
        print(text, flush=True)


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """The items, with a bar on rank 0 where there is a terminal."""
    if not first_rank() or not sys.stdout.isatty():
        yield from items
        return
    from rich.progress import track as rich_track

    yield from rich_track(items, description=text, total=total)


def since_start() -> float:
    """Seconds since this process was started, imports included."""
    with Path("/proc/self/stat").open() as file:
        started = int(file.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
