"""Samples in tar shards of the WebDataset layout, read in place with an index.

The index lies next to the shards, or in the cache folder if theirs is not writable.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unic_ds.config import data_spec
from unic_ds.config.data_spec import COMPRESSED, exists
from unic_ds.data import shard_index
from unic_ds.data.image_files import SUFFIXES, is_hidden
from unic_ds.data.labels import CLASSES, class_names
from unic_ds.data.order import SampleGroup, SampleGroups
from unic_ds.data.source import MAX_MB, Source, refuse_large, versions_of
from unic_ds.data.string_table import StringTable
from unic_ds.files import cache_root, open_regular
from unic_ds.files.printable import printable
from unic_ds.process.console import say

INDEX = "unic_ds-index.npz"
OPEN = 256
"""Shards that are kept open."""


class MissingShard(RuntimeError):
    """A shard was deleted during the run: no single sample is bad."""


class _Descriptor:
    """A file that is open for reading, closed when the last reference is dropped."""

    def __init__(self, path: Path):
        self._file = open_regular(path)
        self.number = self._file.fileno()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class OpenFiles:
    """Keeps at most `limit` files open; one that is in use closes after its last read."""

    def __init__(self, limit: int = OPEN):
        self._limit, self._lock = limit, threading.Lock()
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int]]:
        return OpenFiles, (self._limit,)  # another process opens the files again

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Read bytes of a file, fewer at its end; OSError if it cannot be read."""
        with self._lock:
            file = self._open.pop(path, None) or _Descriptor(path)
            self._open[path] = file
            if len(self._open) > self._limit:
                self._open.popitem(last=False)  # closes after its last read
        parts = []
        while size and (part := os.pread(file.number, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)


@dataclass(frozen=True, eq=False)
class Shards(Source):
    """Images in tar files; a sample's name is its member's path."""

    shards: tuple[str, ...] = ()
    shard_N: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    offset_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    size_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    files: OpenFiles = field(default_factory=OpenFiles)

    def read(self, index: int, max_mb: float = MAX_MB) -> NDArray[np.uint8]:
        """The encoded bytes of a sample; MissingShard if its shard was deleted.

        ValueError for more than `max_mb` MB, before anything is read.
        """
        refuse_large(int(self.size_N[index]), max_mb)
        path = self.folder / self.shards[self.shard_N[index]]
        try:
            data = self.files.read(path, int(self.offset_N[index]), int(self.size_N[index]))
        except FileNotFoundError as error:
            raise MissingShard(
                f"shard {str(path)!r} was deleted during the run; restore it and resume"
            ) from error
        return np.frombuffer(data, dtype=np.uint8)

    def groups(self, window: int) -> SampleGroups:
        """One group, shuffled on two levels: shards, then the samples of `window` shards."""
        counts_S = np.bincount(self.shard_N, minlength=len(self.shards))
        return (SampleGroup(len(self), tuple(counts_S[counts_S > 0].tolist()), window),)

    def fingerprint(self) -> str:
        """SHA-256 of the names and the samples per shard: the order depends on both."""
        digest = hashlib.sha256(self.names.joined())
        digest.update(np.bincount(self.shard_N, minlength=len(self.shards)).tobytes())
        return digest.hexdigest()

    def versions(self, index_M: ArrayLike) -> str:
        """SHA-256 of the sizes and times of change of the shards of some samples."""
        used = np.unique(self.shard_N[np.asarray(index_M, dtype=np.int64)]).tolist()
        paths = [self.folder / self.shards[shard] for shard in used]
        return hashlib.sha256("\n".join(versions_of(paths)).encode()).hexdigest()

    def subset(self, index_M: ArrayLike) -> Self:
        """The samples at those ascending indices, with the same classes."""
        chosen_M = np.asarray(index_M, dtype=np.int64)
        fewer = super().subset(chosen_M)
        return replace(
            fewer,
            shard_N=self.shard_N[chosen_M],
            offset_N=self.offset_N[chosen_M],
            size_N=self.size_N[chosen_M],
        )


def found_in(folder: Path) -> list[Path]:
    """The tar files of a folder, sorted by name; ValueError if all are compressed."""
    with os.scandir(folder) as entries:
        rest = sorted(entries, key=lambda entry: entry.name)
    tars = [folder / entry.name for entry in rest if entry.name.endswith(".tar")]
    zipped = [entry.name for entry in rest if entry.name.lower().endswith(COMPRESSED)]
    if tars or not zipped or any(entry.is_dir() or _is_image(entry.name) for entry in rest):
        return tars
    raise ValueError(f"{str(folder / zipped[0])!r} {data_spec.remedy(Path(zipped[0]))}")


def describe_unread(folder: Path, tars: Sequence[Path]) -> str:
    """A line with counts of the images, folders and archives next to the shards of a folder.

    They are not read. Empty if there are none.
    """
    with os.scandir(folder) as entries:
        rest = [entry for entry in entries if not is_hidden(entry.name)]
    count = {
        "folders": sum(entry.is_dir() for entry in rest),
        "images": sum(_is_image(entry.name) for entry in rest),
        "compressed archives (unpack them to .tar)": sum(
            entry.name.lower().endswith(COMPRESSED) for entry in rest
        ),
    }
    parts = [f"{number} {kind}" for kind, number in count.items() if number]
    if not parts:
        return ""
    read = f"read as tar shards ({len(tars)}, the first is '{printable(tars[0].name)}')"
    return f"{printable(folder)}: {read}; not read: {', '.join(parts)}"


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def of_shards(where: Path, tars: Sequence[Path]) -> Shards:
    """The samples of tar shards of one folder; their index is built if there is none.

    `where` is their folder, or the first of them. ValueError if the index does not fit the shards,
    or they contain no image.
    """
    folder = where if where.is_dir() else where.parent
    places, known = index_places(where, tars), class_names(folder)
    file = next((place for place in places if exists(place)), None)
    if file is None:
        file = shard_index.save(shard_index.build(tars, known), *places)
    tables = shard_index.load(file, tars)
    shard_index.compare(tables, folder, tars, file=file)
    classes = tuple(StringTable.cut(tables["classes"].tobytes()))
    notes = shard_index.notes_of(tables)
    if known != list(classes[: len(known)]) and not any(CLASSES in note for note in notes):
        notes.append(
            f"{CLASSES} differs from the index and is ignored; to use it, delete {str(file)!r}"
        )
    for note in notes:
        say(f"{printable(where)}: {printable(note)}")
    if not len(tables["offset_N"]):
        raise ValueError(
            f"no {', '.join(SUFFIXES)} in the shards of {str(where)!r}; name shards with images"
        )
    return Shards(
        folder,
        StringTable.cut(tables["names"].tobytes()),
        classes,
        tables["label_N"],
        tuple(StringTable.cut(tables["shards"].tobytes())),
        tables["shard_N"],
        tables["offset_N"],
        tables["size_N"],
    )


def index_places(where: Path, tars: Sequence[Path]) -> tuple[Path, Path]:
    """(next to the shards, in the cache folder): the possible paths of an index."""
    if where.is_dir():
        place, owner = where / INDEX, where
    elif len(tars) == 1:
        place, owner = where.with_suffix(".tar.index.npz"), where
    else:  # some shards of a folder
        names = StringTable.of([tar.name for tar in tars]).joined()
        place = where.with_name(f"unic_ds-index-{hashlib.sha256(names).hexdigest()[:12]}.npz")
        owner = place
    name = hashlib.sha256(os.fsencode(owner.resolve())).hexdigest()
    return place, cache_root() / "indexes" / f"{name}.npz"
