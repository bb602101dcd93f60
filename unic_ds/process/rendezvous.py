"""File by which the ranks of one machine agree on a free port, if deepspeed has no --master_port.

The launcher then sets port 29500 for every job, so two jobs of a machine would collide. Stdlib
only.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

LAUNCHER = b"deepspeed.launcher.launch"
DEFAULT_PORT = "29500"


def port_file() -> Path | None:
    """Path that the ranks of one launch share, for the port that rank 0 finds free.

    None if a port was given, if another launcher started the ranks, and on several machines.
    """
    if os.environ.get("MASTER_PORT") != DEFAULT_PORT or os.environ.get("CROSS_SIZE") != "1":
        return None
    pid = os.getppid()
    while pid > 1 and LAUNCHER not in command_line(pid):
        pid, _ = parent_and_start(pid)
    if pid <= 1:
        return None
    runner, start = parent_and_start(pid)
    if any(word.startswith(b"--master_port") for word in command_line(runner)):
        return None
    folder = private_folder()
    return folder / f"port_{pid}_{start}" if folder else None


def private_folder() -> Path | None:
    """Folder for temporary files that no other user can write to; None if there is none."""
    folder = Path(tempfile.gettempdir()) / f"unic_ds_{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        owned = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if owned and not status.st_mode & 0o022:
            return folder
    return None


def command_line(pid: int) -> list[bytes]:
    """Words of the command line of a process; empty if it has exited."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def parent_and_start(pid: int) -> tuple[int, str]:
    """(pid of its parent, start time in ticks since boot) of a process; (0, "") if it has ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[1]), fields[19]
    return 0, ""
