"""Standard streams whose writes do not fail if a pipe is closed, a disk full or a terminal lost."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any, TextIO


class Stream(io.FileIO):
    """File descriptor whose writes do not fail; data that cannot be written is dropped."""

    def __init__(self, number: int, on_error: Callable[[OSError], None]):
        """`on_error` is called with the first error."""
        super().__init__(number, "wb", closefd=False)
        self.on_error = on_error
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write some or all bytes of `data`; the number of bytes that are written or dropped."""
        try:
            while (count := super().write(data)) is None:  # another process made it non-blocking
                select.select([], [self], [])
        except OSError as error:
            self.fail(error)
            return len(data)
        return count

    def fail(self, error: OSError) -> None:
        """Store and report an error, if it is the first."""
        if self.error is None:
            self.error = error
            self.on_error(error)


def protect(on_error: Callable[[OSError], None]) -> Stream:
    """Replace stdout and stderr by streams whose writes do not fail; returns stdout's.

    `on_error` is called once if stdout is closed or cannot be written. Text that the encoding
    lacks, as in a path that is not UTF-8, is escaped.
    """
    # A descriptor that is closed would be given to the next file that is opened, and everything
    # that prints through C would write into it.
    closed = [number for number in (0, 1, 2) if not is_open(number)]
    for _ in closed:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    made = Stream(1, on_error)
    sys.stderr = text(Stream(2, lambda _: None), sys.stderr)
    sys.stdout = text(made, sys.stdout)
    if 1 in closed:
        made.fail(OSError(errno.EBADF, "it is closed"))
    return made


def text(raw: Stream, before: TextIO | None) -> io.TextIOWrapper:
    """Text stream that writes line by line to `raw`, with the encoding of `before`."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
        write_through=isinstance(before, io.TextIOWrapper) and before.write_through,
    )


def is_open(number: int) -> bool:
    """True if a file descriptor is open."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
