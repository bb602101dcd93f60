"""`unic-ds watch RUN`: shows a run in the terminal until it is finished, or q is pressed.

The folder is only read. Files may vanish, be replaced or be incomplete while they are read: then
the last frame stays, and its last line says why.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from unic_ds.files import run_files
from unic_ds.report import run_record
from unic_ds.report.run_record import GrowingLog, RunRecord
from unic_ds.report.watch_view import frame

EVERY_S = 2.0
"""Seconds between frames."""

LOOKED_AT = (
    "config.yaml",
    run_files.LOG,
    run_files.EVENTS,
    run_files.TEACHERS,
    run_files.START,
    run_files.HEARTBEATS,
    "results.json",
    "student",
)
"""Files of a run folder that are read again only if they have changed."""

Signature = tuple[int, int, int] | None
"""Values that change when a file does; None without a file."""

HINT = "q ends this view; the run goes on"


class Watched:
    """A run folder that is read again and again."""

    def __init__(self, folder: Path):
        """ValueError if it is no run folder."""
        self.folder = folder
        self.log = GrowingLog(folder / run_files.LOG)
        self.state: list[Signature] = []
        self.problem = ""
        self.record = self.read()

    def read(self) -> RunRecord:
        """The record of the current stage; of its log only new lines are read. Errors as there."""
        stage = run_record.current_stage(self.folder)
        if stage != self.log.file.parent:
            self.log = GrowingLog(stage / run_files.LOG)
        return run_record.read(stage, self.log)

    def update(self) -> None:
        """Read the folder if it has changed; the last record stays if it cannot be read."""
        state = [signature(self.log.file.parent / name) for name in LOOKED_AT]
        if state == self.state and not self.problem and not self.over_stage:
            return
        try:
            self.record, self.problem, self.state = self.read(), "", state
        except (OSError, ValueError) as error:
            self.problem = f"not read just now: {error}"

    @property
    def over_stage(self) -> bool:
        """True if an earlier stage has ended: the next one is in another folder."""
        return self.record.finished and not self.finished

    @property
    def finished(self) -> bool:
        """True if the whole run is finished."""
        return self.record.finished and self.record.folder == self.folder


def signature(path: Path) -> Signature:
    """Values that change when a file does; None if it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def run(folder: Path, *, once: bool) -> int:
    """Show the run, one frame if `once` or if stdout is no terminal; the exit code."""
    watched, console = Watched(folder), Console(highlight=False)
    if not (once or watched.finished or not console.is_terminal or console.is_dumb_terminal):
        try:
            with until_signal(), keys() as pressed:
                show(watched, console, pressed=pressed)
        except KeyboardInterrupt:
            return 0
        if not watched.finished:
            return 0
    console.print(drawn(watched, console, height=None))
    return 0


def show(watched: Watched, console: Console, *, pressed: Keys) -> None:
    """Show frames on the terminal's other screen until the run is finished or q is pressed."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not watched.finished:
            view = drawn(watched, console, height=console.height, note=HINT)
            live.update(view, refresh=True)
            if pressed.quits(EVERY_S):
                break
            watched.update()


def drawn(watched: Watched, console: Console, *, height: int | None, note: str = "") -> Group:
    """The frame of what was read last, for the size of the console."""
    return frame(
        watched.record,
        width=console.width,
        height=height,
        encoding=console.encoding,
        note=watched.problem or note,
    )


class Keys:
    """Keys that are pressed in a terminal, without waiting for the end of the line."""

    def __init__(self, terminal: int | None):
        """`terminal` is its file number; None: there is none, and no key is ever pressed."""
        self.terminal = terminal

    def quits(self, seconds: float) -> bool:
        """Wait so long for a key; True if it is q, or the end of the input."""
        waits = [] if self.terminal is None else [self.terminal]
        ready, _, _ = select.select(waits, [], [], seconds)
        if not ready or self.terminal is None:
            return False
        try:
            text = os.read(self.terminal, 64)
        except OSError:  # the terminal is gone
            return True
        return not text or any(key in text for key in b"qQ\x04")


@contextmanager
def keys() -> Iterator[Keys]:
    """Context manager in which single keys of the terminal on stdin can be read, if it is one."""
    if not sys.stdin.isatty():
        yield Keys(None)
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield Keys(terminal)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextmanager
def until_signal() -> Iterator[None]:
    """Context manager that SIGTERM leaves by KeyboardInterrupt, so that the screen is restored."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
