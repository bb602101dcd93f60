"""Turn the value of `--data.train` or `--data.val` into a source of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from unic_ds.config import data_spec
from unic_ds.data import image_files, shards
from unic_ds.data.source import Source, mixture
from unic_ds.process.console import say


def scan(given: str | Path) -> Source:
    """The source that a data specification names (see `data_spec.parts`).

    ValueError if it has no samples.
    """
    rows = [
        (source, weight, str(path))
        for path, weight in data_spec.parts(str(given) if given else "")
        for source in _sources(data_spec.expanded(path))
    ]
    parts, weights, names = zip(*rows, strict=True) if rows else ((), (), ())
    return parts[0] if weights == (1.0,) else mixture(str(given), parts, weights, names)


def _sources(paths: Sequence[Path]) -> Iterator[Source]:
    """A source for the shards of each folder, and for every other path."""
    tars: dict[Path, list[Path]] = {}
    for path in paths:
        if path.suffix == ".tar" and data_spec.exists(path) and not path.is_dir():
            tars.setdefault(path.parent, []).append(path)
        else:
            yield _source(path)
    for folder, some in tars.items():
        all_of_folder = len(some) > 1 and sorted(some) == shards.found_in(folder)
        yield shards.of_shards(folder if all_of_folder else min(some), sorted(some))


def _source(path: Path) -> Source:
    if not data_spec.exists(path):
        raise ValueError(f"images {str(path)!r} do not exist; check --data.train and --data.val")
    if path.is_dir():
        tars = shards.found_in(path)
        has_index = (path / shards.INDEX).exists()  # without shards: they are missing
        if tars and (line := shards.describe_unread(path, tars)):
            say(line)
        return shards.of_shards(path, tars) if tars or has_index else image_files.of_folder(path)
    if path.suffix == ".txt":
        return image_files.of_list(path)
    raise ValueError(f"{str(path)!r} {data_spec.remedy(path)}")
