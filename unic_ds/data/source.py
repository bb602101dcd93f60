"""The index of an image folder: its samples, their names and classes.

A sample is known by its path below the folder, so a data set may move, and adding images moves no
other image between training and validation. Nothing is opened here: 1.3 million files are listed in
seconds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unic_ds import chance

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FLAT = -1  # label of an image that lies in no class folder


@dataclass(frozen=True, eq=False)
class Source:
    """Samples by name; `label_N` points into `classes`, or is -1 directly below the folder."""

    folder: Path
    names: tuple[str, ...]
    classes: tuple[str, ...]
    label_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The file's bytes, still encoded; OSError where the file system refuses."""
        return np.fromfile(self.folder / self.names[index], dtype=np.uint8)

    def fingerprint(self) -> str:
        """sha256 over the names in order: a run is resumed only on the same samples."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()

    def relabelled(self, classes: tuple[str, ...]) -> Source:
        """The same samples labelled by `classes`; ValueError for a class folder not among them."""
        foreign = sorted(set(self.classes) - set(classes))
        if foreign and classes:
            raise ValueError(
                f"{str(self.folder)!r} has class folder {foreign[0]!r}, which the training images"
                " lack; remove it or rename it"
            )
        place = {name: i for i, name in enumerate(classes)}
        number = np.array([*(place.get(name, -1) for name in self.classes), -1], dtype=np.int64)
        return Source(self.folder, self.names, classes, number[self.label_N])

    def subset(self, indices: ArrayLike) -> Source:
        """The samples at `indices`, in that order, with the same classes."""
        chosen_M = np.asarray(indices, dtype=np.int64)
        names = tuple(self.names[i] for i in chosen_M)
        return Source(self.folder, names, self.classes, self.label_N[chosen_M])


def scan(folder: str | Path) -> Source:
    """The images below `folder`, links followed; ValueError where there is no folder or no image.

    A sample's class is the first folder below `folder` on its path.
    """
    root = Path(folder)
    if not str(folder):
        raise ValueError("no image folder is named; set --data.train DIR")
    if not root.exists():
        raise ValueError(
            f"image folder {str(root)!r} does not exist; check --data.train and --data.val"
        )
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is a file, not a folder of images")
    try:
        names = sorted(_walk(str(root), "", ()))
    except PermissionError as error:
        raise ValueError(
            f"image folder {error.filename!r} may not be listed; ask its owner"
        ) from error
    if not names:
        raise ValueError(
            f"no {', '.join(SUFFIXES)} below {str(root)!r}; name a folder that has images"
        )
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = tuple(sorted(set(tops) - {""}))
    number = {top: i for i, top in enumerate(classes)} | {"": FLAT}
    return Source(
        root, tuple(names), classes, np.array([number[top] for top in tops], dtype=np.int64)
    )


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Names of images below `folder`; `above` are the (device, inode) of the folders it lies in."""
    stat = os.stat(folder)  # noqa: PTH116 - a Path per folder and file triples the time of a scan
    here = (stat.st_dev, stat.st_ino)
    if here in above:  # a link to a folder that contains it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, here))
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                yield prefix + entry.name


def split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """(train, val): about `share` of the samples held out, each by a hash of seed and its own name.

    ValueError where a side comes out empty though both were asked for.
    """
    if share == 0:
        return source, source.subset([])
    names = (os.fsencode(name).decode("latin-1") for name in source.names)
    at_N = np.array([chance.number(seed, f"split/{name}") for name in names], dtype=np.float64)
    held_N = at_N < share * 2.0**63
    for side, empty in (("training", held_N.all()), ("validation", not held_N.any())):
        if empty:
            given = f"data.val_share {share} of {len(source)} images"
            raise ValueError(f"{given} leaves none for {side}; use more images or another share")
    return source.subset(np.flatnonzero(~held_N)), source.subset(np.flatnonzero(held_N))
