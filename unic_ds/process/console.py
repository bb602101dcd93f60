"""Console output of a job: rank 0 prints lines and progress bars for all ranks. Stdlib and rich."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def first_rank() -> bool:
    """True on rank 0 and in a process without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line on rank 0."""
    if first_rank():
        print(text, flush=True)


LINE_S = 30.0
"""Seconds between lines of progress if stdout is no terminal."""


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """Yield the items; rank 0 shows a progress bar, or a line now and then if stdout is a file."""
    if not first_rank():
        yield from items
        return
    if not sys.stdout.isatty():
        last = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - last > LINE_S:
                say(f"{text}: {done} of {total}")
                last = time.monotonic()
            yield item
        return
    from rich.progress import track as rich_track  # 60 ms; --help does not need it

    yield from rich_track(items, description=text, total=total)


def since_start() -> float:
    """Seconds since this process started, imports included."""
    with Path("/proc/self/stat").open() as file:
        started = int(file.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
