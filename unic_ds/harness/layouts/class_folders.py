"""Class folders below `train/` and `val/` (or `validation/`, `test/`): the layout of ImageNet.

A folder without these is split: a seeded fifth of its images is held out.
"""

from __future__ import annotations

from pathlib import Path

from unic_ds import data
from unic_ds.config import Config
from unic_ds.data import Source
from unic_ds.files.printable import printable
from unic_ds.harness.image_sets import SampledImages, scan
from unic_ds.process import console

VAL = ("val", "validation", "test")
HELD_OUT = 0.2


def open_sets(folder: Path, cfg: Config) -> dict[str, SampledImages]:
    """The training and validation images; ValueError unless both have two classes or more."""
    train, val = open_sources(folder, cfg.seed)
    check_classes(train, val, folder)
    return {
        "train": SampledImages(train, cfg, cfg.eval.max_train, name=folder.name),
        "val": SampledImages(val, cfg, cfg.eval.max_val, name=folder.name),
    }


def open_sources(folder: Path, seed: int) -> tuple[Source, Source]:
    """The sources of training and validation images, with the same classes."""
    val = next((folder / name for name in VAL if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and val:
        train = scan(str(folder / "train"))
        return train, scan(str(val)).relabelled(train.classes)
    console.say(f"{printable(folder)} has no train/ and val/: {HELD_OUT:.0%} of it are held out")
    return data.split(scan(str(folder)), HELD_OUT, seed)


def check_classes(train: Source, val: Source, folder: Path) -> None:
    """Raise ValueError unless both sides have images of two classes or more."""
    for name, side in (("training", train), ("validation", val)):
        classes = len(set(side.label_N[side.label_N >= 0].tolist()))
        if classes < 2:
            raise ValueError(
                f"{str(folder)!r} has {classes} class folders with {name} images; put the images of"
                " each class, two or more, into a folder of its own"
            )
