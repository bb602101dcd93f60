"""The samples of what `--data.train` and `--data.val` name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from unic_ds.config import data_spec
from unic_ds.data import image_files, shards
from unic_ds.data.source import Source, mixture
from unic_ds.process.console import say


def scan(given: str | Path) -> Source:
    """A source of what is named (see `named.parts`); ValueError where there are no samples."""
    rows = [
        (source, weight)
        for path, weight in data_spec.parts(str(given) if given else "")
        for source in _each(data_spec.expanded(path))
    ]
    parts, weights = zip(*rows, strict=True) if rows else ((), ())
    return parts[0] if weights == (1.0,) else mixture(str(given), parts, weights)


def _each(paths: Sequence[Path]) -> Iterator[Source]:
    """A source for the shards of each folder, and for every other path."""
    tars: dict[Path, list[Path]] = {}
    for path in paths:
        if path.suffix == ".tar" and data_spec.exists(path) and not path.is_dir():
            tars.setdefault(path.parent, []).append(path)
        else:
            yield _one(path)
    for folder, some in tars.items():
        every = len(some) > 1 and sorted(some) == shards.found_in(folder)  # by the folder's index
        yield shards.of_shards(folder if every else min(some), sorted(some))


def _one(path: Path) -> Source:
    if not data_spec.exists(path):
        raise ValueError(f"images {str(path)!r} do not exist; check --data.train and --data.val")
    if path.is_dir():
        tars = shards.found_in(path)
        known = (path / shards.INDEX).exists()  # then shards are missing, if there are none
        if tars and (line := shards.passed_over(path, tars)):
            say(line)
        return shards.of_shards(path, tars) if tars or known else image_files.of_folder(path)
    if path.suffix == ".txt":
        return image_files.of_list(path)
    raise ValueError(f"{str(path)!r} {data_spec.remedy(path)}")
