"""The lock of a run folder, which the process that trains there holds."""

from __future__ import annotations

import fcntl
from pathlib import Path

from unic_ds.files import open_regular

FILE = ".lock"


def refusal(out: Path) -> ValueError:
    """The error of a second job in a run folder."""
    return ValueError(f"another job trains in {str(out)!r}; end it, or choose another --out")


def is_held(out: Path) -> bool:
    """True if a process holds the lock of a run folder."""
    try:
        with open_regular(out / FILE) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, no right to read it, or a file system without locks
        return False
    return False
