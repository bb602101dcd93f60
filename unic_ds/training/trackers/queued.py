"""A service in a thread: training waits neither for its import nor for a network."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread, main_thread

import numpy as np
from numpy.typing import NDArray

from unic_ds.training.trackers.tracker import End, Row, Tracker

WAITING = 4096
"""The most calls that wait: those of 10 minutes without a network, at a log line per second."""

CLOSE_S = 20.0
"""Seconds that a service has at the end for what is left; the last checkpoint is saved by then."""

LAST_S = 2.0
"""Seconds that the process of a service has at the end of ours."""

Call = Callable[[Tracker], None]


class Queued:
    """Tracker that passes calls to another in a thread, whose exception the next call raises."""

    def __init__(
        self, open_tracker: Callable[[], Tracker], *, program: str = "", close_s: float = CLOSE_S
    ):
        """`program` is that of a process which the service starts.

        The service would wait for it at the end of this process, however long a network is down.
        """
        self.open_tracker, self.close_s = open_tracker, close_s
        self.calls: Queue[Call | None] = Queue(WAITING)
        self.error: Exception | None = None
        self.end: End = "finished"
        self.close_time: float | None = None
        self.thread = Thread(target=self.work, name="tracker", daemon=True)
        self.thread.start()
        if program:
            Thread(target=end_at_exit, args=(program,), name="trackers' end", daemon=True).start()

    def work(self) -> None:
        """Open the tracker, pass calls on until there are no more, and close it."""
        try:
            tracker = self.open_tracker()
            while call := self.calls.get():
                call(tracker)
            tracker.close(self.end)
        except Exception as error:  # raised by the next call
            self.error = error

    def add(self, call: Call | None) -> None:
        """Let a call wait for its turn; None is the last."""
        if self.error:
            raise self.error
        try:
            self.calls.put_nowait(call)
        except Full:
            raise TimeoutError(f"{WAITING} calls behind") from None

    def scalars(self, row: Row, *, step: int) -> None:
        """Add a log line."""
        self.add(lambda tracker: tracker.scalars(row, step=step))

    def histogram(self, name: str, value_N: NDArray[np.floating], *, step: int) -> None:
        """Add a distribution."""
        self.add(lambda tracker: tracker.histogram(name, value_N, step=step))

    def picture(self, name: str, image_HW3: NDArray[np.uint8], *, caption: str, step: int) -> None:
        """Add an image, which may change afterwards."""
        image = image_HW3.copy()
        self.add(lambda tracker: tracker.picture(name, image, caption=caption, step=step))

    def text(self, name: str, text: str, *, step: int) -> None:
        """Add a text."""
        self.add(lambda tracker: tracker.text(name, text, step=step))

    def begin_close(self, end: End) -> None:
        """Let the end wait for its turn; `close_s` begins now."""
        if self.close_time is None:
            self.close_time = time.monotonic() + self.close_s
            self.end = end
            self.add(None)

    def close(self, end: End) -> None:
        """Wait for what is left; TimeoutError `close_s` after the end has begun."""
        self.begin_close(end)
        assert self.close_time is not None
        self.thread.join(max(0.0, self.close_time - time.monotonic()))
        if self.thread.is_alive():
            raise TimeoutError(f"it has not taken the last lines within {self.close_s:g} s")
        if self.error:
            raise self.error


def end_at_exit(program: str) -> None:
    """Wait for the end of the main thread, then end the processes of a program."""
    main_thread().join()
    time.sleep(LAST_S)
    end_children(program)


def end_children(program: str) -> None:
    """Kill the processes of a program that this process has started."""
    for listed in Path("/proc/self/task").glob("*/children"):
        for child in listed.read_text().split():
            with suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == program:
                    os.kill(int(child), signal.SIGKILL)
