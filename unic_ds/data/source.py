"""What every kind of source offers: samples known by name, with classes, read by their number.

A sample is known by its path below the source, so a data set may move, and adding images moves no
other image between training and validation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unic_ds import rng
from unic_ds.config import Data
from unic_ds.data import order
from unic_ds.data.order import Run, Runs
from unic_ds.data.string_table import StringTable, together
from unic_ds.files import open_regular
from unic_ds.files.printable import printable
from unic_ds.process import console

FLAT = -1  # label of a sample without a class
MAX_MB = Data().max_mb


def refuse_large(size: int, max_mb: float) -> None:
    """ValueError for a sample of more than `max_mb` MB."""
    if size > max_mb * 1e6:
        raise ValueError(f"has {size} bytes, more than data.max_mb {max_mb:g}")


@dataclass(frozen=True, eq=False)
class Source:
    """Files below `folder` by name; `label_N` points into `classes`, or is -1 where there is none.

    Other kinds of source know better where their samples lie.
    """

    folder: Path
    names: StringTable
    classes: tuple[str, ...]
    label_N: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, max_mb: float = MAX_MB) -> NDArray[np.uint8]:
        """A sample's bytes, still encoded; OSError where the file system refuses.

        OSError too for what is no regular file, ValueError for more than `max_mb` MB, both before
        anything is read.
        """
        with open_regular(self.folder / self.names[index]) as file:
            size = os.fstat(file.fileno()).st_size
            refuse_large(size, max_mb)
            return np.frombuffer(file.read(size) or b"", dtype=np.uint8)

    @property
    def per_epoch(self) -> int:
        """Images that an epoch shows."""
        return order.per_epoch(self.runs(window=1))

    def runs(self, window: int) -> Runs:
        """How its samples are shuffled, given how many shards mix."""
        return (Run(len(self)),)

    def fingerprint(self) -> str:
        """sha256 over the names in order: a run is resumed only on the same samples."""
        return hashlib.sha256(self.names.joined()).hexdigest()

    def relabelled(self, classes: tuple[str, ...]) -> Self:
        """The same samples labelled by `classes`; ValueError for a class that is not among them."""
        foreign = sorted(set(self.classes) - set(classes))
        if foreign and classes:
            raise ValueError(
                f"{str(self.folder)!r} has class folder {foreign[0]!r}, which the training images"
                " lack; remove it or rename it"
            )
        place = {name: i for i, name in enumerate(classes)}
        number = [*(place.get(name, FLAT) for name in self.classes), FLAT]
        return replace(
            self, classes=classes, label_N=np.array(number, dtype=np.int32)[self.label_N]
        )

    def subset(self, index_M: ArrayLike) -> Self:
        """The samples at those ascending places, with the same classes."""
        chosen_M = np.asarray(index_M, dtype=np.int64)
        return replace(self, names=self.names.taken(chosen_M), label_N=self.label_N[chosen_M])


@dataclass(frozen=True, eq=False)
class Mixture(Source):
    """Several sources one after another, each shown `weights` times an epoch."""

    parts: tuple[Source, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def _start_M(self) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, self.parts)])

    def read(self, index: int, max_mb: float = MAX_MB) -> NDArray[np.uint8]:
        """A sample's bytes from the source that has it."""
        start_M = self._start_M
        part = int(np.searchsorted(start_M, index, "right")) - 1
        return self.parts[part].read(index - int(start_M[part]), max_mb)

    def runs(self, window: int) -> Runs:
        """Those of the parts, weighted."""
        return tuple(
            part.runs(window)[0]._replace(weight=weight)
            for part, weight in zip(self.parts, self.weights, strict=True)
        )

    def fingerprint(self) -> str:
        """Over those of the parts and their weights."""
        prints = [part.fingerprint() for part in self.parts]
        return hashlib.sha256(repr((prints, self.weights)).encode()).hexdigest()

    def subset(self, index_M: ArrayLike) -> Self:
        """The samples at those ascending places; a part that loses all of its own is gone."""
        chosen_M, start_M = np.asarray(index_M, dtype=np.int64), self._start_M
        cut_M = np.searchsorted(chosen_M, start_M)
        parts = [
            (part.subset(chosen_M[low:high] - start), weight)
            for part, weight, start, low, high in zip(
                self.parts, self.weights, start_M[:-1], cut_M[:-1], cut_M[1:], strict=True
            )
            if high > low
        ]
        left, weights = (tuple(x) for x in zip(*parts, strict=True)) if parts else ((), ())
        names, label_N = self.names.taken(chosen_M), self.label_N[chosen_M]
        return replace(self, names=names, label_N=label_N, parts=left, weights=weights)


def say_unlabelled(where: Path, label_N: NDArray[np.int32]) -> None:
    """Print how many images of a source have no class, if any."""
    if flat := int((label_N == FLAT).sum()):
        count = f"{flat} of {len(label_N)} images have no class"
        console.say(f"{printable(where)}: {count}: training shows them, evaluation leaves them out")


def mixture(where: str, parts: Sequence[Source], weights: Sequence[float]) -> Mixture:
    """One source of several; their classes are joined by name."""
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
    )


def split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """(train, val): about `share` of the samples held out, each by a hash of seed and its own name.

    ValueError where a side comes out empty though both were asked for.
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
