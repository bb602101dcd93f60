"""Several data sets of class folders below one folder, or below folders of groups.

DIR/pets/train/CLASS/*.jpg    DIR/pets/val/CLASS/*.jpg     the set `pets`
DIR/cog/level_1/train/...     DIR/cog/level_1/val/...      the set `cog/level_1` of the group cog
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unic_ds.config import Config
from unic_ds.files.printable import printable
from unic_ds.harness.image_sets import SampledImages
from unic_ds.harness.layouts import class_folders

MEAN = "mean"
"""The last word of a row that is a mean."""


def open_sets(folder: Path, cfg: Config) -> dict[str, SampledImages]:
    """`NAME/train` and `NAME/val` of each set; ValueError for one that cannot be evaluated."""
    found: dict[str, SampledImages] = {}
    for name, where in data_sets(folder):
        try:
            sets = class_folders.open_sets(where, cfg)
            check_known(sets["train"], sets["val"], where)
        except ValueError as error:
            raise ValueError(f"set {name!r}: {error}") from error
        found |= {f"{name}/{side}": images for side, images in sets.items()}
    return found


def data_sets(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and folders of the sets, in order; ValueError if there is none, or for a name."""
    if has_sides(folder):
        raise ValueError(
            f"{str(folder)!r} is one data set, with train/ and val/; name the folder above it,"
            " which may have several"
        )
    below = folders(folder)
    if not below:
        raise ValueError(
            f"{str(folder)!r} has no folders; put each data set into a folder of its own, with"
            " train/ and val/ of class folders"
        )
    for found in below:
        grouped = not has_sides(found) and any(map(has_sides, folders(found)))
        for where in folders(found) if grouped else [found]:
            name = printable(where.relative_to(folder))
            if name.split("/")[-1].split(" ")[-1] == MEAN:
                raise ValueError(f"{str(where)!r} has the name of a mean; rename the folder")
            yield name, where


def folders(folder: Path) -> list[Path]:
    """The folders directly below a folder, in order, without hidden ones."""
    found = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in found if path.is_dir())


def has_sides(folder: Path) -> bool:
    """True if training and validation images have folders of their own."""
    val = any((folder / name).is_dir() for name in class_folders.VAL)
    return (folder / "train").is_dir() and val


def check_known(train: SampledImages, val: SampledImages, folder: Path) -> None:
    """Raise ValueError for a class that has validation images only."""
    known, asked = (set(side.source.label_N.tolist()) - {-1} for side in (train, val))
    if asked - known:
        name = train.classes[min(asked - known)]
        raise ValueError(
            f"{str(folder)!r} has validation images of class {name!r}, but no training image; add"
            " some, or remove the class"
        )
