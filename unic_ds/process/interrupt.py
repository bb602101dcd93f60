"""Signals that end a run: outside the training loop at once, inside it after a save."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PATIENCE_S = 5.0
"""Seconds that the main thread has to return from C code and to report."""
LEAVE_S = 15.0
"""Seconds that Python's own exit may take after the report."""

Handler = Callable[[int, FrameType | None], None]
reported = threading.Event()
"""Set as soon as the main thread reports how the process ends."""
_received: list[int] = []  # the signal that Interrupted was raised for


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by a signal that ends the run."""

    def __init__(self, number: int):
        name = signal.Signals(number).name
        super().__init__(f"ended by {name}; the same command goes on from the newest checkpoint")
        self.number = number


def install() -> None:
    """Let each of the signals raise Interrupted in the main thread.

    A process whose main thread does not return from C code, as in a collective that waits for
    another rank, is ended by a second thread after PATIENCE_S.
    """
    handle(end)
    watch()


def handle(handler: Handler | signal.Handlers) -> None:
    """Give the signals a handler; SIGHUP stays ignored in a run that `nohup` started."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end(number: int, _: FrameType | None) -> None:
    """Raise Interrupted, once: launchers repeat a signal while the process leaves."""
    handle(repeat)
    _received.append(number)
    raise Interrupted(number)


def cause(error: BaseException) -> BaseException:
    """The interruption that led to an exception, or else itself.

    A library whose import is interrupted may swallow that and fail in another way.
    """
    if _received and not isinstance(error, KeyboardInterrupt):
        return Interrupted(_received[0])
    return error


def repeat(number: int, _: FrameType | None) -> None:
    """Ignore a signal that comes again."""


@cache
def watch() -> None:
    """Start the thread that ends the process where the main thread cannot."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=end_late, args=(reader,), name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=forget)


def end_late(reader: int) -> None:
    """Read the numbers of signals from a pipe; one that ends the process does so in time."""
    while data := os.read(reader, 1):
        number = data[0]
        if number not in SIGNALS or signal.getsignal(number) not in (end, repeat):
            continue
        if reported.wait(PATIENCE_S):
            time.sleep(LEAVE_S)
        elif os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, f"unic_ds: {Interrupted(number)}\n".encode())
        os._exit(128 + number)


def forget() -> None:
    """Give a forked process the default handlers: its signals are not the run's."""
    with suppress(ValueError):  # forked by another thread than the main one
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)


def pause() -> None:
    """Ignore the signals from here on, where they have been installed."""
    if watch.cache_info().currsize:
        handle(repeat)


def stop() -> None:
    """Let the signals end the process at once, where they have been installed."""
    if watch.cache_info().currsize:
        handle(signal.SIG_DFL)
