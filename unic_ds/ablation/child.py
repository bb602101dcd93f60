"""Child processes: a command of unic_ds in a session of its own, which gets our signals."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from unic_ds.files import open_regular
from unic_ds.files.printable import printable
from unic_ds.process import interrupt
from unic_ds.process.child_verb import ERROR

TRAIN = Path(__file__).parent.parent / "train.py"
STARTED = "unic_ds: started: "
"""Beginning of a line of a log, as `ERROR` is of others."""

FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""Signals that torchrun passes on to its ranks."""
SHUTDOWN_S = 300
"""Seconds in which ranks save after a signal, before torchrun kills them."""

PATIENCE = 3
"""Signals after which a child is killed."""
TAIL = 1 << 16
"""Bytes at the end of a log in which its error is looked for."""

Start = Callable[[Sequence[str], int, Path], int]
"""Runs a verb of unic_ds with its words on so many ranks; its output goes to a file.

Returns the exit code. Raises `interrupt.Interrupted` after a signal, once the child has ended.
"""


def command(words: Sequence[str], ranks: int) -> list[str]:
    """Arguments that run a verb in one process, or under a launcher on this node."""
    verb, *rest = words
    if ranks == 1:
        return [sys.executable, "-m", "unic_ds.cli", *words]
    # As slurm/node.sh. The deepspeed launcher would ignore CUDA_VISIBLE_DEVICES.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher += [f"--signals-to-handle={','.join(FORWARDED)}", f"--shutdown-timeout={SHUTDOWN_S}"]
    program = [str(TRAIN), *rest] if verb == "train" else ["-m", "unic_ds.cli", *words]
    return [sys.executable, *launcher, *program]


def start(words: Sequence[str], ranks: int, log: Path) -> int:
    """Run a verb, as `Start` says: its output is added to the file, after its command."""
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = command(words, ranks)
    with log.open("ab") as file, forwarded_signals() as signals:
        file.write(f"{STARTED}{printable(shlex.join(words), TAIL)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        signals.send_to(process.pid)
        code = process.wait()
        while signals.received and group_lives(process.pid):  # ranks save after their launcher
            time.sleep(0.1)
    if signals.received:
        raise interrupt.Interrupted(signals.received[0])
    return code


@dataclass
class Signals:
    """Signals that came, and the process group that gets them; from the third on it is killed."""

    received: list[int] = field(default_factory=list)
    group: int = 0

    def forward(self, number: int, _: FrameType | None) -> None:
        """Handler that sends a signal on."""
        self.received.append(number)
        if self.group and len(self.received) >= PATIENCE:
            kill_all(self.group)
        elif self.group:
            with suppress(ProcessLookupError):
                os.killpg(self.group, number)

    def send_to(self, group: int) -> None:
        """Name the group, which gets the signals that came before."""
        self.group = group
        for number in self.received:
            os.killpg(group, number)


@contextmanager
def forwarded_signals() -> Iterator[Signals]:
    """Context manager in which signals that end a run are sent to a child instead.

    SIGHUP stays ignored under `nohup`.
    """
    found, before = Signals(), {}
    for number in interrupt.SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, found.forward)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def group_lives(group: int) -> bool:
    """True if a process group has processes."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def kill_all(leader: int) -> None:
    """Kill the group of a process and its descendants, since torchrun's ranks are in others."""
    ranks = []
    with suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(leader).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.kill()


def log_error(log: Path, sentence: str) -> None:
    """Add an error to a log, as `last_error` finds it."""
    with log.open("a") as file:
        file.write(f"{STARTED}nothing\n{ERROR}{sentence}\n")


def last_error(log: Path) -> str:
    """The last error that a log reports, or its last line; empty without a log."""
    try:
        with open_regular(log) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL))
            text = file.read(TAIL).decode(errors="replace")
    except OSError:
        return ""
    latest = text.rpartition(STARTED)[2].partition("\n")[2] if STARTED in text else text
    lines = [line.strip() for line in latest.splitlines() if line.strip()]
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return printable((errors or lines or [""])[-1])
