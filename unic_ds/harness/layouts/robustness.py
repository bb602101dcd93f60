"""Class folders of training images below `train/`, and of each test set below another folder.

DIR/train/CLASS/*.jpg  DIR/val/CLASS/*.jpg  DIR/imagenet-r/CLASS/*.jpg  ...
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from timm.data import ImageNetInfo

from unic_ds.config import Config
from unic_ds.data import Source
from unic_ds.data.labels import is_number
from unic_ds.files.printable import printable
from unic_ds.harness.image_sets import SampledImages, scan
from unic_ds.harness.layouts.transfer import folders


def open_sets(folder: Path, cfg: Config) -> dict[str, SampledImages]:
    """`train` and the test sets by the names of their folders.

    ValueError unless all have two classes or more, and the test sets some of the training classes.
    """
    tests = [path for path in folders(folder) if path.name != "train"]
    if not (folder / "train").is_dir() or not tests:
        raise ValueError(
            f"{str(folder)!r} wants a folder train/ of class folders, and beside it a folder for"
            " each test set, such as val/ and imagenet-r/"
        )
    train = checked(scan(str(folder / "train")))
    found = {"train": SampledImages(train, cfg, cfg.eval.max_train, name=printable(folder.name))}
    for path in tests:
        name, test = printable(path.name), known(checked(scan(str(path))), train)
        found[name] = SampledImages(test, cfg, cfg.eval.max_val, name=name)
    return found


def checked(source: Source) -> Source:
    """The source; ValueError unless it has images of two classes or more."""
    classes = len(set(source.label_N[source.label_N >= 0].tolist()))
    if classes < 2:
        raise ValueError(
            f"{str(source.folder)!r} has {classes} class folders with images; put the images of"
            " each class, two or more, into a folder of its own"
        )
    return source


def known(test: Source, train: Source) -> Source:
    """The test source with the training source's names of its classes; ValueError for others.

    ImageNet-V2 has the numbers of ImageNet's classes, in the order of their WordNet ids.
    """
    synsets = tuple(ImageNetInfo().label_names())
    numbered = train.classes == synsets and all(map(is_number, test.classes))
    if numbered and max(map(int, test.classes)) < len(synsets):
        return replace(test, classes=tuple(synsets[int(name)] for name in test.classes))
    test.relabelled(train.classes)
    return test
