"""A rank's sign of life: OUT/heartbeats/rank_NNNNN.json, written over in place and read by others.

In place and of one size: a beat then asks nothing of a file system's metadata server, and succeeds
on a disk that has become full. A reader that meets half a record keeps the one before.
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

from unic_ds.files import read_limited

FOLDER = "heartbeats"
SIZE = 2048  # bytes of a record, whatever it says


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What one rank last said of itself."""

    start: str  # which start of the run this belongs to
    rank: int
    host: str
    realm: str  # ranks of one realm see each other's processes
    pid: int
    born: str  # when the process began: a pid alone may have passed to another
    beat: int = 0
    step: int = 0
    phase: str = ""
    moves: int = 0  # phases that it has been through
    idle_s: float = 0.0  # since the last of them began
    where: str = ""  # line of ours that its main thread was in
    error: str = ""  # of a rank that failed
    time: float = 0.0  # for people; nobody compares clocks

    @property
    def who(self) -> str:
        """Which process of which machine."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


def own(start: str, rank: int) -> Heartbeat:
    """This process's first."""
    pid = os.getpid()
    return Heartbeat(
        start=start,
        rank=rank,
        host=socket.gethostname(),
        realm=pid_namespace(),
        pid=pid,
        born=start_ticks(pid),
    )


def pid_namespace() -> str:
    """Names the machine since its boot, and what processes can be seen from here."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    return ""


def start_ticks(pid: int) -> str:
    """When a process that is still alive began, in ticks since boot; empty where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def near(pulse: Heartbeat) -> bool:
    """Whether that rank's process could be seen from here."""
    return bool(pulse.realm) and pulse.realm == pid_namespace()


def has_exited(pulse: Heartbeat) -> bool:
    """Whether that rank's process is known to be no more."""
    return near(pulse) and start_ticks(pulse.pid) != pulse.born


def file_of(out: Path, rank: int) -> Path:
    """Where a rank's pulse is kept."""
    return out / FOLDER / f"rank_{rank:05d}.json"


def write(out: Path, pulse: Heartbeat) -> None:
    """Say it, over what was said before."""
    said = record(pulse)
    while len(said) >= SIZE and pulse.error:  # letters beyond ASCII take up to twelve bytes
        pulse = replace(pulse, error=pulse.error[: len(pulse.error) // 2])
        said = record(pulse)
    text = said.ljust(SIZE - 1) + "\n"
    assert len(text) == SIZE, said
    file = os.open(file_of(out, pulse.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def record(pulse: Heartbeat) -> str:
    """A pulse as text, and when it was said."""
    return json.dumps(asdict(pulse) | {"time": round(time.time(), 3)})


def read(file: Path) -> Heartbeat | None:
    """What a file says; None where there is none, half of one, or something else."""
    try:
        found = Heartbeat(**json.loads(read_limited(file, 32 * SIZE)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return found if is_whole(found) else None


def is_whole(pulse: Heartbeat) -> bool:
    """Return true where every field is of its type, and `start` may be part of a file's name."""
    kinds = {"str": (str,), "int": (int,), "float": (int, float)}
    values = [(getattr(pulse, f.name), kinds[str(f.type)]) for f in fields(pulse)]
    typed = all(type(value) in kind for value, kind in values)
    return typed and math.isfinite(pulse.time) and bool(re.fullmatch(r"[\w-]{1,64}", pulse.start))


def files(out: Path) -> list[Path]:
    """The files of a run's pulses, in rank order."""
    return sorted((out / FOLDER).glob("rank_*.json"))


def read_all(out: Path) -> list[Heartbeat]:
    """Every pulse of a run folder, of whichever start."""
    found = map(read, files(out))
    return [pulse for pulse in found if pulse]
