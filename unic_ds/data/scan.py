"""What `--data.train` and `--data.val` name: a folder, tar shards, a list, or several of them."""

from __future__ import annotations

from pathlib import Path

from unic_ds.data import files, shards
from unic_ds.data.source import Source, mixture


def scan(named: str | Path) -> Source:
    """The samples of what is named; ValueError where there are none.

    A folder of images, a folder of `.tar` files or one of them, a list (`.txt`), or several with
    commas between, each with `=WEIGHT` after it where an epoch shows it more or less than once. A
    path that is there is taken as it is, commas and all.
    """
    if not str(named):
        raise ValueError(
            "no images are named; set --data.train to a folder, tar shards or a list of them"
        )
    if Path(named).exists():
        return _one(Path(named))
    given = [_weighed(part.strip()) for part in str(named).split(",") if part.strip()]
    parts = [_one(Path(path)) for path, _ in given]
    weights = [weight for _, weight in given]
    return parts[0] if weights == [1.0] else mixture(str(named), parts, weights)


def _weighed(part: str) -> tuple[str, float]:
    """(path, weight) of one source of a mixture."""
    path, equals, weight = part.rpartition("=")
    if not equals or Path(part).exists():
        return part, 1.0
    try:
        times = float(weight)
    except ValueError:
        return part, 1.0
    if not 0 < times <= 1000:
        raise ValueError(f"the weight of {path!r} is {weight}; give one above 0 and at most 1000")
    return path, times


def _one(path: Path) -> Source:
    if not path.exists():
        raise ValueError(f"images {str(path)!r} do not exist; check --data.train and --data.val")
    if path.is_dir():
        tars = shards.found_in(path)
        known = (path / shards.INDEX).exists()  # then shards are missing, if there are none
        return shards.of_shards(path, tars) if tars or known else files.of_folder(path)
    if path.suffix == ".tar":
        return shards.of_shards(path, [path])
    if path.suffix == ".txt":
        return files.of_list(path)
    raise ValueError(
        f"{str(path)!r} is no source of images; name a folder of images or .tar shards, a .tar, or"
        " a .txt with one path a line"
    )
