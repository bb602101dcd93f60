"""Sources of samples: images with names and classes, read by index.

A sample's name is its path below the source, so a data set may be moved, and adding images moves no
other image between training and validation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unic_ds import rng
from unic_ds.config import Data
from unic_ds.data import order
from unic_ds.data.order import SampleGroup, SampleGroups
from unic_ds.data.string_table import StringTable, together
from unic_ds.files import open_regular
from unic_ds.files.printable import printable
from unic_ds.process import console

NO_CLASS = -1  # label of a sample without a class
MAX_MB = Data().max_mb
STATS = 16
"""Threads that ask for the sizes of files."""


def refuse_large(size: int, max_mb: float) -> None:
    """Raise ValueError for a sample of more than `max_mb` MB."""
    if size > max_mb * 1e6:
        raise ValueError(f"has {size} bytes, more than data.max_mb {max_mb:g}")


def versions_of(paths: Sequence[Path]) -> list[str]:
    """Size and time of change of each file; empty for one that cannot be read."""

    def version(path: Path) -> str:
        try:
            found = path.stat()
        except OSError:
            return ""
        return f"{found.st_size} {found.st_mtime_ns}"

    with ThreadPoolExecutor(STATS) as pool:  # a network file system answers many at once
        return list(pool.map(version, paths))


@dataclass(frozen=True, eq=False)
class Source:
    """Image files below `folder`; `label_N` is the index into `classes`, -1 for no class.

    Subclasses read samples from other places.
    """

    folder: Path
    names: StringTable
    classes: tuple[str, ...]
    label_N: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, max_mb: float = MAX_MB) -> NDArray[np.uint8]:
        """The encoded bytes of a sample.

        OSError if it cannot be read or is not a regular file; ValueError for more than `max_mb` MB,
        before anything is read.
        """
        with open_regular(self.folder / self.names[index]) as file:
            size = os.fstat(file.fileno()).st_size
            refuse_large(size, max_mb)
            return np.frombuffer(file.read(size) or b"", dtype=np.uint8)

    @property
    def per_epoch(self) -> int:
        """Images of an epoch."""
        return order.per_epoch(self.groups(window=1))

    @property
    def part_names(self) -> tuple[str, ...]:
        """Paths of the sources of a mixture, as they were given; else its own."""
        return (str(self.folder),)

    def part_of(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `part_names` of some samples."""
        return np.zeros_like(index_B)

    def groups(self, window: int) -> SampleGroups:
        """Groups of samples that are shuffled together, mixing those of `window` shards."""
        return (SampleGroup(len(self)),)

    def fingerprint(self) -> str:
        """SHA-256 of the names in order: a run resumes only on the same samples."""
        return hashlib.sha256(self.names.joined()).hexdigest()

    def versions(self, index_M: ArrayLike) -> str:
        """SHA-256 of the sizes and times of change of the files of some samples."""
        paths = [self.folder / self.names[int(i)] for i in np.asarray(index_M)]
        return hashlib.sha256("\n".join(versions_of(paths)).encode()).hexdigest()

    def relabelled(self, classes: tuple[str, ...]) -> Self:
        """The same samples with labels into `classes`; ValueError for a class not in them."""
        foreign = sorted(set(self.classes) - set(classes))
        if foreign and classes:
            raise ValueError(
                f"{str(self.folder)!r} has class folder {foreign[0]!r}, which the training images"
                " do not have; remove it or rename it"
            )
        index_of = {name: i for i, name in enumerate(classes)}
        label_C = [*(index_of.get(name, NO_CLASS) for name in self.classes), NO_CLASS]
        return replace(
            self, classes=classes, label_N=np.array(label_C, dtype=np.int32)[self.label_N]
        )

    def subset(self, index_M: ArrayLike) -> Self:
        """The samples at those ascending indices, with the same classes."""
        chosen_M = np.asarray(index_M, dtype=np.int64)
        return replace(self, names=self.names.taken(chosen_M), label_N=self.label_N[chosen_M])


@dataclass(frozen=True, eq=False)
class Mixture(Source):
    """Several sources as one; an epoch shows the samples of each `weights` times."""

    parts: tuple[Source, ...] = ()
    weights: tuple[float, ...] = ()
    given: tuple[str, ...] = ()  # path of each part; shards of several folders have the same

    @property
    def part_names(self) -> tuple[str, ...]:
        """Paths of the parts, as they were given."""
        return self.given

    def part_of(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `part_names` of some samples."""
        return np.searchsorted(self._start_M, index_B, "right") - 1

    @property
    def _start_M(self) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, self.parts)])

    def read(self, index: int, max_mb: float = MAX_MB) -> NDArray[np.uint8]:
        """The encoded bytes of a sample; errors as the part that contains it."""
        start_M = self._start_M
        part = int(self.part_of(np.array(index)))
        return self.parts[part].read(index - int(start_M[part]), max_mb)

    def versions(self, index_M: ArrayLike) -> str:
        """SHA-256 of the sizes and times of change of the files of some samples."""
        chosen_M, start_M = np.asarray(index_M, dtype=np.int64), self._start_M
        found = [
            part.versions(chosen_M[(chosen_M >= start) & (chosen_M < start + len(part))] - start)
            for part, start in zip(self.parts, start_M[:-1].tolist(), strict=True)
        ]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()

    def groups(self, window: int) -> SampleGroups:
        """One group per part, with its weight."""
        return tuple(
            part.groups(window)[0]._replace(weight=weight)
            for part, weight in zip(self.parts, self.weights, strict=True)
        )

    def fingerprint(self) -> str:
        """SHA-256 of the fingerprints of the parts and their weights."""
        prints = [part.fingerprint() for part in self.parts]
        return hashlib.sha256(repr((prints, self.weights)).encode()).hexdigest()

    def subset(self, index_M: ArrayLike) -> Self:
        """The samples at those ascending indices; a part without any of them is dropped."""
        chosen_M, start_M = np.asarray(index_M, dtype=np.int64), self._start_M
        cut_M = np.searchsorted(chosen_M, start_M)
        parts = [
            (part.subset(chosen_M[low:high] - start), weight, name)
            for part, weight, name, start, low, high in zip(
                *(self.parts, self.weights, self.given, start_M[:-1], cut_M[:-1], cut_M[1:]),
                strict=True,
            )
            if high > low
        ]
        kept, weights, given = (tuple(x) for x in zip(*parts, strict=True)) if parts else ((),) * 3
        names, label_N = self.names.taken(chosen_M), self.label_N[chosen_M]
        return replace(self, names=names, label_N=label_N, parts=kept, weights=weights, given=given)


def say_unlabelled(where: Path, label_N: NDArray[np.int32]) -> None:
    """Print how many images of a source have no class, if any."""
    if unlabelled := int((label_N == NO_CLASS).sum()):
        count = f"{unlabelled} of {len(label_N)} images have no class"
        console.say(f"{printable(where)}: {count}; training uses them, evaluation skips them")


def mixture(
    where: str, parts: Sequence[Source], weights: Sequence[float], given: Sequence[str]
) -> Mixture:
    """Join several sources into one, and their classes by name; `given` are the parts' paths."""
    classes = tuple(sorted({name for part in parts for name in part.classes}))
    same = tuple(part.relabelled(classes) for part in parts)
    for part in parts:
        if classes and not part.classes:
            say_unlabelled(part.folder, part.label_N)
    return Mixture(
        Path(where),
        together([part.names for part in same]),
        classes,
        np.concatenate([part.label_N for part in same]),
        same,
        tuple(weights),
        tuple(given),
    )


def split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """(train, val): hold out about `share` of the samples, by a hash of the seed and their name.

    A `share` of 0 holds out none. ValueError if either side would be empty otherwise.
    """
    if share == 0:
        return source, source.subset([])
    names = (source.names.encoded(i).decode("latin-1") for i in range(len(source)))
    at_N = np.fromiter((rng.seed_for(seed, f"split/{name}") for name in names), dtype=np.float64)
    held_N = at_N < share * 2.0**63
    for side, empty in (("training", held_N.all()), ("validation", not held_N.any())):
        if empty:
            given = f"data.val_share {share} of {len(source)} images"
            raise ValueError(f"{given} leaves none for {side}; use more images or another share")
    return source.subset(np.flatnonzero(~held_N)), source.subset(np.flatnonzero(held_N))
