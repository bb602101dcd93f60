"""NYU depth v2's layouts: images with depth maps, PNG files of 16 bits in mm; 0 is unknown.

BTS's lists, `*train*.txt` and `*test*.txt` with `IMAGE MAP FOCAL` a line, paths below `sync/` and
`official_splits/test/`, or below the folder itself. Without lists `train/images/NAME.jpg`,
`train/depth/NAME.png`, and the same below `val/` or `test/`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from unic_ds.config import Config
from unic_ds.files import read_text
from unic_ds.files.printable import printable
from unic_ds.harness.layouts import map_files, sample_files
from unic_ds.harness.layouts.map_files import BITS_16, DepthFiles, Pair

ROOTS = {
    "train": ("sync", "train", ""),
    "test": ("official_splits/test", "test", ""),
}
"""Folders that the paths of a list may be below, by the part of its name."""
VAL = ("val", "validation", "test")
TREES = (
    "BTS's lists (*train*.txt, *test*.txt), or {train,val}/images/*.jpg and {train,val}/depth/*.png"
)


def open_sets(folder: Path, cfg: Config) -> dict[str, DepthFiles]:
    """The training and validation images with depth maps, after their headers are checked.

    ValueError for a folder of another layout, and as `map_files.chosen` and `check_headers`.
    """
    lists = {key: sorted(folder.glob(f"*{key}*.txt")) for key in ROOTS}
    if several := next((found for found in lists.values() if len(found) > 1), None):
        names = ", ".join(printable(file.name) for file in several)
        raise ValueError(f"{str(folder)!r} has several lists of a split, {names}; keep one")
    if all(lists.values()):
        train, val = (list_pairs(folder, lists[key][0], ROOTS[key]) for key in ROOTS)
    else:
        test = next((name for name in VAL if (folder / name).is_dir()), "")
        if not test or not (folder / "train").is_dir():
            raise ValueError(f"{str(folder)!r} has no depth maps; name a folder with {TREES}")
        train, val = (folder_pairs(folder, name) for name in ("train", test))
    found = {
        "train": DepthFiles(
            folder, map_files.chosen(train, folder, cfg.eval.max_train, cfg), cfg.data
        ),
        "val": DepthFiles(folder, map_files.chosen(val, folder, cfg.eval.max_val, cfg), cfg.data),
    }
    for files in found.values():
        map_files.check_headers(files.pairs, folder, cfg.data, BITS_16)
    if len(found["train"]) < 2:
        raise ValueError(f"{str(folder)!r} has one training image; a depth head wants two or more")
    return found


def list_pairs(folder: Path, file: Path, roots: tuple[str, ...]) -> list[Pair]:
    """Pairs of a list, sorted; lines without a map (`None`) are left out.

    ValueError with the number of a line that is malformed or leaves the folder.
    """
    pairs = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        words = [word.lstrip("/") for word in line.split()[:2]]
        if not words or words[1:] == ["None"]:
            continue
        if len(words) < 2 or not all(map(sample_files.stays_inside, words)):
            raise ValueError(
                f"line {number} of {str(file)!r} is {printable(line)!r}; write the paths of an"
                " image and of its map, below the folder"
            )
        pairs.append(Pair(*words))
    root = next((r for r in roots if pairs and (folder / r / pairs[0].image).is_file()), "")
    below = [Pair(*(str(PurePosixPath(root, name)) for name in pair)) for pair in pairs]
    return sorted(below)


def folder_pairs(folder: Path, split: str) -> list[Pair]:
    """Images below `SPLIT/images`, and their maps below `SPLIT/depth`."""
    names = map_files.images_below(folder / split / "images")
    return [
        Pair(f"{split}/images/{n}", f"{split}/depth/{PurePosixPath(n).with_suffix('.png')}")
        for n in names
    ]
