"""SPair-71k's layout: image pairs with keypoints that correspond (arXiv 1908.10543).

`PairAnnotation/test/PAIR.json`, `JPEGImages/CATEGORY/IMAGE.jpg`; `Layout/large/test.txt` lists the
pairs of the test split, without it all of the folder are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unic_ds.config import Config, Data
from unic_ds.evaluate.features import Annotation
from unic_ds.evaluate.samples import ImagePair, UnreadableImage
from unic_ds.files import read_text
from unic_ds.files.printable import printable
from unic_ds.harness.layouts import sample_files

PAIRS, IMAGES, LAYOUT = "PairAnnotation/test", "JPEGImages", "Layout/large/test.txt"
LARGEST = 1 << 20
"""Bytes of the largest annotation of a pair; SPair's have 2 kB."""
MOST_POINTS = 10_000


class Pair(NamedTuple):
    """The annotation of a pair."""

    source: str
    """Path of the image below `JPEGImages`."""
    target: str
    source_K2: Tensor
    target_K2: Tensor
    target_box_4: Tensor
    category: str


@dataclass(frozen=True)
class SPair:
    """The test pairs (`samples.SampleSet` of ImagePair)."""

    folder: Path
    pairs: tuple[Pair, ...]
    limits: Data
    annotations: frozenset[Annotation] = frozenset({"keypoints"})

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories."""
        return tuple(sorted({pair.category for pair in self.pairs}))

    @cached_property
    def identity(self) -> str:
        """Hash of the images' names, sizes and times, and of the pairs' annotations."""
        names = sorted({name for pair in self.pairs for name in (pair.source, pair.target)})
        facts = [
            [part.tolist() if isinstance(part, Tensor) else part for part in pair]
            for pair in self.pairs
        ]
        return sample_files.identity((self.folder / IMAGES / name for name in names), facts)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, place: int) -> ImagePair:
        """Decode a pair; UnreadableImage if an image is broken or lacks one of the keypoints."""
        pair = self.pairs[place]
        images = []
        for name, point_K2 in ((pair.source, pair.source_K2), (pair.target, pair.target_K2)):
            file = self.folder / IMAGES / name
            image_3HW = sample_files.read_image(file, self.limits)
            height, width = image_3HW.shape[1:]
            size_2 = torch.tensor([width, height])
            if (point_K2 < -1).any() or (point_K2 > size_2).any():
                raise UnreadableImage(
                    f"{printable(file)} has {width} x {height} pixels, and a keypoint outside"
                )
            images.append(image_3HW)
        return ImagePair(images[0], images[1], *pair[2:])


def open_sets(folder: Path, cfg: Config) -> dict[str, SPair]:
    """The test pairs as `val`, at most `eval.max_val`; nothing is trained.

    ValueError for a folder of another layout, annotations that are not SPair's, or images that are
    not there; no image is read.
    """
    files = annotation_files(folder)
    chosen_N = sample_files.sampled(len(files), cfg.eval.max_val, cfg.seed)
    pairs = tuple(read_pair(files[place]) for place in chosen_N.tolist())
    names = sorted({name for pair in pairs for name in (pair.source, pair.target)})
    if lost := sample_files.missing(folder / IMAGES, names):
        raise ValueError(
            f"{len(lost)} of {len(names)} images are missing below {str(folder / IMAGES)!r}, first"
            f" {printable(lost[0])!r}; copy them, or remove the pairs that name them"
        )
    return {"val": SPair(folder, pairs, cfg.data)}


def annotation_files(folder: Path) -> list[Path]:
    """Annotations of the test pairs, in the order of the list if there is one."""
    known = sample_files.listed(folder / PAIRS)
    names = sorted(name for name in known if name.endswith(".json"))
    if not names:
        raise ValueError(
            f"no pair in {str(folder / PAIRS)!r}; name the folder of SPair-71k that has"
            f" {PAIRS}/*.json and {IMAGES}/CATEGORY/*.jpg"
        )
    layout = folder / LAYOUT
    if layout.is_file():
        names = [f"{line.strip()}.json" for line in read_text(layout).splitlines() if line.strip()]
        if lost := [name for name in names if name not in known]:
            raise ValueError(
                f"{len(lost)} of {len(names)} pairs of {str(layout)!r} are missing in"
                f" {str(folder / PAIRS)!r}, first {printable(lost[0])!r}; copy them, or remove"
                " the list"
            )
    if not names:
        raise ValueError(f"{str(layout)!r} lists no pair; remove it to use all of {PAIRS}")
    return [folder / PAIRS / name for name in names]


def read_pair(file: Path) -> Pair:
    """A pair's annotation; ValueError with the file's name if it is not as SPair's."""
    try:
        found = json.loads(read_text(file, LARGEST))
        if not isinstance(found, dict):
            raise ValueError("is no JSON object")
        return parse_pair(found)
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error.strerror or error})") from None
    except RecursionError:
        raise ValueError(f"{str(file)!r} is nested too deeply; it is no pair of SPair") from None
    except ValueError as error:
        raise ValueError(
            f"{str(file)!r} is no pair as SPair-71k's: {printable(error)}; correct or remove it"
        ) from None


def parse_pair(found: Mapping[str, object]) -> Pair:
    """The annotation of a JSON object; ValueError with the key that is wrong."""
    category = found.get("category")
    names = [found.get("src_imname"), found.get("trg_imname")]
    for key, value in (("category", category), ("src_imname", names[0]), ("trg_imname", names[1])):
        if not sample_files.stays_inside(value):
            raise ValueError(f"{key} {value!r} is no name")
    source_K2, target_K2 = (numbers(found, key, 2) for key in ("src_kps", "trg_kps"))
    if not 0 < len(source_K2) == len(target_K2) <= MOST_POINTS:
        raise ValueError(f"src_kps has {len(source_K2)} points, trg_kps {len(target_K2)}")
    box_4 = numbers(found, "trg_bndbox", 4)[0]
    if not (box_4[2:] > box_4[:2]).all():
        raise ValueError(f"trg_bndbox {box_4.tolist()} is no box x0, y0, x1, y1")
    images = [f"{category}/{name}" for name in names]
    return Pair(images[0], images[1], source_K2, target_K2, box_4, str(category))


def numbers(found: Mapping[str, object], key: str, width: int) -> Tensor:
    """The finite fp32 numbers (K, width) of a list; ValueError with the key."""
    try:
        array = np.array(found.get(key), dtype=np.float64).reshape(-1, width)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key} is no list of {width} numbers each") from None
    if not len(array) or not (np.abs(array) < 1e9).all():
        raise ValueError(f"{key} has no numbers, or some that are not finite")
    return torch.from_numpy(array.astype(np.float32))
