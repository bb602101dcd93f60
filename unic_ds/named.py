"""What `--data.train` and `--data.val` name: one source of images, or several with weights."""

from __future__ import annotations

import os
from pathlib import Path

KINDS = "a folder of images or .tar shards, a .tar, or a .txt with one path a line"


def parts(named: str) -> list[tuple[Path, float]]:
    """(path, weight) of each source; ValueError where there is none or a weight is wrong.

    Several stand with commas between, each with `=WEIGHT` after it where an epoch shows it more or
    less than once. A path that is there is taken as it is, commas and all.
    """
    if not named:
        raise ValueError(f"no images are named; set --data.train to {KINDS}")
    if Path(named).exists():
        return [(Path(named), 1.0)]
    return [_weighed(part.strip()) for part in named.split(",") if part.strip()]


def check(named: str, option: str) -> None:
    """ValueError for what can be told without opening anything: nothing there, or not a source."""
    for path, _ in parts(named):
        what = f"{option} {str(path)!r}"
        if not path.exists():
            raise ValueError(f"{what} does not exist; give {KINDS}")
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            raise ValueError(f"{what} may not be read; mend its permissions")
        if path.is_dir() and not any(path.iterdir()):
            raise ValueError(f"{what} is empty; give {KINDS}")
        if path.is_file() and path.suffix not in (".tar", ".txt"):
            raise ValueError(f"{what} is no source of images; give {KINDS}")


def _weighed(part: str) -> tuple[Path, float]:
    """(path, weight) of one source of a mixture."""
    path, equals, weight = part.rpartition("=")
    if not equals or Path(part).exists():
        return Path(part), 1.0
    try:
        times = float(weight)
    except ValueError:
        return Path(part), 1.0
    if not 0 < times <= 1000:
        raise ValueError(f"the weight of {path!r} is {weight}; give one above 0 and at most 1000")
    return Path(path), times
