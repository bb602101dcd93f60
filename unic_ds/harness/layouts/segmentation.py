"""ADE20K's and VOC's layouts: images with a class per pixel.

ADE20K: `images/{training,validation}/NAME.jpg`, `annotations/{training,validation}/NAME.png`; class
0 is ignored, the others count from 1. VOC: `JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png`,
names in `ImageSets/Segmentation/{train,val}.txt`; 255 is ignored. A `classes.txt` beside these, a
name a line, replaces the 150 or 21 classes.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from unic_ds.config import Config
from unic_ds.files import read_text
from unic_ds.files.printable import printable
from unic_ds.harness.layouts import map_files, sample_files
from unic_ds.harness.layouts.map_files import BITS_8, MaskFiles, Pair

ADE20K_CLASSES, VOC_CLASSES = 150, 21
MOST_CLASSES = 255
LISTS = "ImageSets/Segmentation"
TREES = (
    "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png (ADE20K), or"
    f" JPEGImages/*.jpg, SegmentationClass/*.png and {LISTS}/{{train,val}}.txt (VOC)"
)


def open_sets(folder: Path, cfg: Config) -> dict[str, MaskFiles]:
    """The training and validation images with masks, after their headers are checked.

    ValueError for a folder of another layout, for validation masks with a class too many, and as
    `map_files.chosen` and `check_headers`.
    """
    voc = (folder / LISTS).is_dir()
    if not voc and not ((folder / "images").is_dir() and (folder / "annotations").is_dir()):
        raise ValueError(f"{str(folder)!r} has no masks; name a folder with {TREES}")
    classes = class_names(folder, VOC_CLASSES if voc else ADE20K_CLASSES)
    found = {}
    for name, split, limit in (
        ("train", "train" if voc else "training", cfg.eval.max_train),
        ("val", "val" if voc else "validation", cfg.eval.max_val),
    ):
        pairs = voc_pairs(folder, split) if voc else ade_pairs(folder, split)
        kept = map_files.chosen(pairs, folder, limit, cfg)
        found[name] = MaskFiles(folder, kept, cfg.data, classes, from_1=not voc)
    for files in found.values():
        map_files.check_headers(files.pairs, folder, cfg.data, BITS_8)
    found["val"].check_classes()  # the others' are checked as they are read, from the first step
    return found


def ade_pairs(folder: Path, split: str) -> list[Pair]:
    """Images of ADE20K's layout, and their masks."""
    names = map_files.images_below(folder / "images" / split)
    return [
        Pair(
            f"images/{split}/{name}",
            f"annotations/{split}/{PurePosixPath(name).with_suffix('.png')}",
        )
        for name in names
    ]


def voc_pairs(folder: Path, split: str) -> list[Pair]:
    """Images of a list of VOC, and their masks; ValueError for a list that cannot be read."""
    file = folder / LISTS / f"{split}.txt"
    try:
        names = read_text(file).split()
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error.strerror or error})") from error
    for name in names:
        if not sample_files.stays_inside(name):
            raise ValueError(
                f"{str(file)!r} names {printable(name)!r}, which is no name of an image; remove it"
            )
    return [Pair(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names]


def class_names(folder: Path, count: int) -> tuple[str, ...]:
    """Lines of classes.txt; without it the numbers of `count` classes. ValueError if too many."""
    file = folder / "classes.txt"
    if not file.is_file():
        return tuple(map(str, range(count)))
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not 2 <= len(names) <= MOST_CLASSES:
        raise ValueError(
            f"{str(file)!r} names {len(names)} classes; write 2 to {MOST_CLASSES}, a line each"
        )
    return tuple(names)
