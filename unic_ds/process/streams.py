"""Standard streams that cannot end a program: a closed pipe, a full disk or a lost terminal costs
what is printed, not the run. Stdlib only.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any


class Stream(io.FileIO):
    """A file descriptor whose writes do not fail; what could not be written is dropped."""

    def __init__(self, number: int, lost: Callable[[OSError], None]):
        """`lost` is called with the first error."""
        super().__init__(number, "wb", closefd=False)
        self.lost = lost
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write some or all bytes of `data`; the number that the caller may forget."""
        try:
            while (count := super().write(data)) is None:  # another process made it non-blocking
                select.select([], [self], [])
        except OSError as error:
            self.fail(error)
            return len(data)
        return count

    def fail(self, error: OSError) -> None:
        """Keep the first error, and report it."""
        if self.error is None:
            self.error = error
            self.lost(error)


def protect(lost: Callable[[OSError], None]) -> Stream:
    """Replace stdout and stderr by streams whose writes do not fail; returns stdout's.

    `lost` is called once where stdout is closed or cannot be written. Text that the encoding lacks,
    as in a path that is not UTF-8, is escaped.
    """
    # A descriptor that is closed would be given to the next file that is opened, and everything
    # that prints through C would write into it.
    closed = [number for number in (0, 1, 2) if not is_open(number)]
    for _ in closed:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    made = Stream(1, lost)
    sys.stderr = text(Stream(2, lambda _: None), sys.stderr)
    sys.stdout = text(made, sys.stdout)
    if 1 in closed:
        made.fail(OSError(errno.EBADF, "it is closed"))
    return made


def text(raw: Stream, before: Any) -> io.TextIOWrapper:
    """A text stream that writes whole lines to `raw`, encoded as `before` was."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
        write_through=bool(before and before.write_through),
    )


def is_open(number: int) -> bool:
    """True where a file descriptor is open."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
