"""Commands of the first hour's checks: each in its own process group, within a time limit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 5.0
"""For a command that was asked to end, before it is killed."""
ERROR = re.compile(r"(\[rank\d+\]: )?([\w.-]+: error: |[\w.]*(Error|Exception|Interrupt)\b)")
"""First words of a program's sentence or a Python exception; a launcher's own may follow it."""


class Failed(Exception):
    """A command that did not do what its check wants; the text is the reason."""


class Late(Failed):
    """A command that its time limit ended."""


class Process(NamedTuple):
    """A process, known by its start as well, since its number may be used again."""

    pid: int
    started: str


def environment(*, gpu: bool) -> dict[str, str]:
    """This process's environment, with the repository's modules and this Python's programs."""
    env = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    if not gpu:  # DeepSpeed's launcher would look for the GPUs that this names
        env.pop("CUDA_VISIBLE_DEVICES", None)
    folders = [str(ROOT / name) for name in (".", "kernels", "tests/support", "tests/first_hour")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (*folders, env.get("PYTHONPATH"))))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    return env | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def run(
    words: Sequence[str], log: Path, *, limit: float, env: Mapping[str, str]
) -> tuple[int, str]:
    """(exit code, output) of a command; Late if it takes longer than `limit` seconds.

    The output, both streams of it, is added to `log`; nothing that the command started outlives it.
    """
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            list(words),
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Late(f"no end after {limit:.0f} s") from None
        finally:
            end(process)
    return code, log.read_bytes()[begin:].decode(errors="replace")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command and everything that it started: by SIGTERM, then by SIGKILL."""
    family = descendants(process.pid)
    if process.poll() is None:
        send(process.pid, signal.SIGTERM)  # a launcher passes it on
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    for found in {*family, *descendants(process.pid)}:
        if start_of(found.pid) == found.started:
            send(found.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(pid: int) -> list[Process]:
    """Processes that a process started, and theirs; a launcher's ranks lead groups of their own.

    One whose parent has ended is missing: it is found by its process group, if it kept that.
    """
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (fields := stat_of(int(folder.name))):
            parents[Process(int(folder.name), fields[19])] = int(fields[1])
    found, heads = [], {pid}
    while heads:
        below = [process for process, parent in parents.items() if parent in heads]
        found += below
        heads = {process.pid for process in below}
    return found


def stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def start_of(pid: int) -> str:
    """Clock tick at which a process started; empty if there is no such process."""
    return fields[19] if (fields := stat_of(pid)) else ""


def reason_in(output: str) -> str:
    """The last line of an output that names an error, or else the last that says something."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if ERROR.match(line)]
    return [*lines[-1:], *named[-1:]][-1] if lines else "it printed nothing"


class Clock(NamedTuple):
    """When all must be over, by time.monotonic()."""

    end: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self.end - time.monotonic())
