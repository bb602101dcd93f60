"""The samples of what `--data.train` and `--data.val` name."""

from __future__ import annotations

from pathlib import Path

from unic_ds import named
from unic_ds.data import files, shards
from unic_ds.data.source import Source, mixture


def scan(given: str | Path) -> Source:
    """A source of what is named (see `named.parts`); ValueError where there are no samples."""
    rows = named.parts(str(given) if given else "")
    parts = [_one(path) for path, _ in rows]
    weights = [weight for _, weight in rows]
    return parts[0] if weights == [1.0] else mixture(str(given), parts, weights)


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
    raise ValueError(f"{str(path)!r} is no source of images; give {named.KINDS}")
