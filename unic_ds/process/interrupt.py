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

from unic_ds.process import console

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
REPORT_S = 5.0
"""Seconds in which the main thread must return from C code and report."""
EXIT_S = 15.0
"""Seconds that Python's own exit may take after the report."""

Handler = Callable[[int, FrameType | None], None]
reported = threading.Event()
"""Set as soon as the main thread reports the end of the process."""
_received: list[int] = []  # the signal that Interrupted was raised for


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by a signal that ends the run."""

    def __init__(self, number: int):
        name = signal.Signals(number).name
        super().__init__(f"ended by {name}; the same command resumes from the newest checkpoint")
        self.number = number


def install() -> None:
    """Let each of the signals raise Interrupted in the main thread.

    If the main thread does not return from C code, as in a collective that waits for another rank,
    a second thread ends the process after REPORT_S.
    """
    handle(raise_interrupted)
    start_thread()


def handle(handler: Handler | signal.Handlers) -> None:
    """Set the handler of the signals; SIGHUP stays ignored in a run that `nohup` started."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def raise_interrupted(number: int, _: FrameType | None) -> None:
    """Handler that raises Interrupted, once: launchers repeat a signal while the process exits."""
    handle(ignore_repeated)
    _received.append(number)
    raise Interrupted(number)


def cause(error: BaseException) -> BaseException:
    """The interruption that caused an exception, or the exception itself.

    A library whose import is interrupted may catch that and fail in another way.
    """
    if _received and not isinstance(error, KeyboardInterrupt):
        return Interrupted(_received[0])
    return error


def ignore_repeated(number: int, _: FrameType | None) -> None:
    """Handler that does nothing; unlike SIG_IGN it still wakes the second thread."""


@cache
def start_thread() -> None:
    """Start the thread that ends the process if the main thread cannot; once."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=exit_late, args=(reader,), name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=reset_in_child)


def exit_late(reader: int) -> None:
    """Read signal numbers from a pipe; end the process if the main thread has not in time."""
    while data := os.read(reader, 1):
        number = data[0]
        if number not in SIGNALS or signal.getsignal(number) not in (
            raise_interrupted,
            ignore_repeated,
        ):
            continue
        if reported.wait(REPORT_S):
            time.sleep(EXIT_S)
        elif console.first_rank():
            with suppress(OSError):
                os.write(2, f"unic_ds: {Interrupted(number)}\n".encode())
        os._exit(128 + number)


def reset_in_child() -> None:
    """Restore the default handlers in a forked process, which does not handle the run's signals."""
    with suppress(ValueError):  # forked by another thread than the main one
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)


def ignore() -> None:
    """Ignore the signals from now on, if `install` was called."""
    if start_thread.cache_info().currsize:
        handle(ignore_repeated)


def restore_default() -> None:
    """Let the signals end the process at once, if `install` was called."""
    if start_thread.cache_info().currsize:
        handle(signal.SIG_DFL)
