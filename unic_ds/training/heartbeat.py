"""Heartbeat of a rank: OUT/heartbeats/rank_NNNNN.json, overwritten in place and read by others.

Records have constant size, so a write in place changes no metadata of the file system and succeeds
on a full disk. A reader that gets half a record keeps the previous one.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from unic_ds.files import read_limited, run_files

SIZE = 2048  # bytes of a record, whatever it holds
KEYS = {
    "pid_namespace": "realm",
    "start_ticks": "born",
    "phase_changes": "moves",
    "source_line": "where",
}
"""Fields whose key in the file differs; files of older runs have these keys too."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """State of one rank when it last wrote it."""

    start: str  # id of the start of the run that this belongs to
    rank: int
    host: str
    pid_namespace: str  # ranks of one namespace see each other's processes
    pid: int
    start_ticks: str  # start time of the process: a pid alone may be reused
    beat: int = 0  # number of writes so far
    step: int = 0
    phase: str = ""
    phase_changes: int = 0
    idle_s: float = 0.0  # since the last phase change
    source_line: str = ""  # file:line of this package that the main thread is in
    error: str = ""  # of a rank that failed
    time: float = 0.0  # for display; clocks of ranks are not compared

    @property
    def label(self) -> str:
        """Name of the process in messages."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


def create(start: str, rank: int) -> Heartbeat:
    """Heartbeat of this process before its first write."""
    pid = os.getpid()
    return Heartbeat(
        start=start,
        rank=rank,
        host=socket.gethostname(),
        pid_namespace=pid_namespace(),
        pid=pid,
        start_ticks=start_ticks(pid),
    )


def pid_namespace() -> str:
    """Id of this boot of the machine and of the namespace of the processes visible here."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    return ""


def start_ticks(pid: int) -> str:
    """Start time of a running process in ticks since boot; empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if stat[0] in "ZX" else stat[19]


def is_local(heartbeat: Heartbeat) -> bool:
    """True if the rank's process would be visible from here."""
    return bool(heartbeat.pid_namespace) and heartbeat.pid_namespace == pid_namespace()


def has_exited(heartbeat: Heartbeat) -> bool:
    """True if the rank's process is known to have exited."""
    return is_local(heartbeat) and start_ticks(heartbeat.pid) != heartbeat.start_ticks


def file_of(out: Path, rank: int) -> Path:
    """Path of a rank's heartbeat."""
    return out / run_files.HEARTBEATS / f"rank_{rank:05d}.json"


def write(out: Path, heartbeat: Heartbeat) -> None:
    """Overwrite the rank's file, with the present time."""
    heartbeat = replace(heartbeat, time=round(time.time(), 3))
    record = json.dumps(to_json(heartbeat))
    while len(record) >= SIZE and heartbeat.error:  # letters beyond ASCII take up to twelve bytes
        heartbeat = replace(heartbeat, error=heartbeat.error[: len(heartbeat.error) // 2])
        record = json.dumps(to_json(heartbeat))
    text = record.ljust(SIZE - 1) + "\n"
    assert len(text) == SIZE, record
    file = os.open(file_of(out, heartbeat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def to_json(heartbeat: Heartbeat) -> dict[str, object]:
    """The JSON object of a heartbeat's file."""
    return {KEYS.get(name, name): value for name, value in asdict(heartbeat).items()}


def from_json(row: object) -> Heartbeat | None:
    """The heartbeat of a JSON object; None if the value is something else."""
    if not isinstance(row, dict):
        return None
    names = {key: name for name, key in KEYS.items()}
    try:
        found = Heartbeat(**{names.get(key, key): row[key] for key in map(str, row)})
    except TypeError:
        return None
    return found if is_valid(found) else None


def is_valid(heartbeat: Heartbeat) -> bool:
    """True if every field has its type, and `start` can be part of a file name."""
    kinds = {"str": (str,), "int": (int,), "float": (int, float)}
    values = [(getattr(heartbeat, f.name), kinds[str(f.type)]) for f in fields(heartbeat)]
    typed = all(type(value) in kind for value, kind in values)
    return (
        typed
        and math.isfinite(heartbeat.time)
        and bool(re.fullmatch(r"[\w-]{1,64}", heartbeat.start))
    )


def read(file: Path) -> Heartbeat | None:
    """The heartbeat in a file; None if the file is missing, incomplete or something else."""
    try:
        return from_json(json.loads(read_limited(file, 32 * SIZE)))
    except (OSError, ValueError, RecursionError):
        return None


def files(out: Path) -> list[Path]:
    """Heartbeat files of a run folder, in rank order."""
    return sorted((out / run_files.HEARTBEATS).glob("rank_*.json"))


def read_all(out: Path) -> list[Heartbeat]:
    """All heartbeats of a run folder, of every start, in rank order."""
    found = map(read, files(out))
    return [heartbeat for heartbeat in found if heartbeat]
