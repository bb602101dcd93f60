"""The lock of a run folder, `.lock`, which the process that trains there holds."""

from __future__ import annotations

import fcntl
from pathlib import Path

from unic_ds.files import open_regular


def is_held(out: Path) -> bool:
    """True if a process holds the lock of a run folder."""
    try:
        with open_regular(out / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, no right to read it, or a file system without locks
        return False
    return False
