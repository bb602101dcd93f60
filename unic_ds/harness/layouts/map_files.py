"""Images with a map of the same size: PNG files of one channel, classes or millimetres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds.config import Config, Data
from unic_ds.data import image_files, reader
from unic_ds.evaluate.features import Annotation
from unic_ds.evaluate.samples import IGNORED, DepthImage, MaskedImage, UnreadableImage, mapped_ahead
from unic_ds.files.printable import printable
from unic_ds.harness.layouts import sample_files

BITS_8 = frozenset({"L", "P"})
"""PIL's modes of masks: grey, or a palette whose indices are the classes."""
BITS_16 = frozenset({"I", "I;16", "I;16B"})
"""PIL's modes of depth maps."""


class Pair(NamedTuple):
    """Paths of an image and its map, below the folder of the set."""

    image: str
    map: str


@dataclass(frozen=True)
class MaskFiles:
    """Images with masks (`samples.SampleSet` of MaskedImage)."""

    folder: Path
    pairs: tuple[Pair, ...]
    limits: Data
    classes: tuple[str, ...]
    from_1: bool
    """True if classes count from 1 in the files, and 0 is to be ignored."""
    annotations: frozenset[Annotation] = frozenset({"masks"})

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @cached_property
    def identity(self) -> str:
        """Hash of the files' names, sizes and times, and of the classes."""
        files = (self.folder / name for pair in self.pairs for name in pair)
        return sample_files.identity(files, self.classes, self.from_1)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, place: int) -> MaskedImage:
        """Decode a sample; UnreadableImage if it is broken, ValueError for a class too many."""
        image_3HW, value_HW = read_pair(self.folder, self.pairs[place], self.limits, BITS_8)
        class_HW = self.counted(value_HW)
        if problem := self.beyond(class_HW, self.pairs[place]):
            raise ValueError(problem)
        return MaskedImage(image_3HW, torch.from_numpy(class_HW))

    def check_classes(self) -> None:
        """Raise ValueError for a mask with a class too many; all are decoded.

        One that cannot be decoded passes: it is left out when it is read.
        """
        if problem := next(filter(None, mapped_ahead(self.problem_of, self.pairs, ahead=64)), ""):
            raise ValueError(problem)

    def problem_of(self, pair: Pair) -> str:
        """The sentence of `beyond` for the mask of a pair; empty for one that is unreadable."""
        try:
            encoded = sample_files.encoded_bytes(self.folder / pair.map, self.limits)
            value_HW = decode_map(encoded, self.limits, BITS_8)
        except (OSError, ValueError):
            return ""
        return self.beyond(self.counted(value_HW), pair)

    def counted(self, value_HW: NDArray[np.integer]) -> NDArray[np.integer]:
        """Classes from 0 of the values in a file; 255 for none."""
        return value_HW - np.uint8(self.from_1)  # 0 becomes 255

    def beyond(self, class_HW: NDArray[np.integer], pair: Pair) -> str:
        """A sentence if a mask has a class that the set has not; empty if not."""
        found = int(class_HW[class_HW < IGNORED].max(initial=0))
        if found < len(self.classes):
            return ""
        return (
            f"{printable(self.folder / pair.map)} has class {found + self.from_1}"
            f" beyond the {len(self.classes)} of the set; name all in classes.txt, a line each"
        )


@dataclass(frozen=True)
class DepthFiles:
    """Images with depth maps in mm (`samples.SampleSet` of DepthImage)."""

    folder: Path
    pairs: tuple[Pair, ...]
    limits: Data
    classes: tuple[str, ...] = ()
    annotations: frozenset[Annotation] = frozenset({"depth"})

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @cached_property
    def identity(self) -> str:
        """Hash of the files' names, sizes and times."""
        return sample_files.identity(self.folder / name for pair in self.pairs for name in pair)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, place: int) -> DepthImage:
        """Decode a sample; UnreadableImage if it is broken."""
        image_3HW, value_HW = read_pair(self.folder, self.pairs[place], self.limits, BITS_16)
        return DepthImage(image_3HW, torch.from_numpy(value_HW.astype(np.float32) / 1000))


def read_pair(
    folder: Path, pair: Pair, limits: Data, modes: frozenset[str]
) -> tuple[Tensor, NDArray[np.integer]]:
    """The upright image as uint8 RGB 3HW, and the values of its map; UnreadableImage as a text."""
    image_3HW = sample_files.read_image(folder / pair.image, limits)
    with sample_files.named(folder / pair.map):
        encoded = sample_files.encoded_bytes(folder / pair.map, limits)
        value_HW = decode_map(encoded, limits, modes)
    if value_HW.shape != tuple(image_3HW.shape[1:]):  # replaced since it was checked
        raise UnreadableImage(f"{printable(folder / pair.map)} has not the size of its image")
    return image_3HW, value_HW


def decode_map(
    encoded: NDArray[np.uint8], limits: Data, modes: frozenset[str]
) -> NDArray[np.integer]:
    """Values (H, W) of a PNG of one channel; ValueError with the reason if it is broken."""
    reader.measure(encoded, limits.max_megapixels)
    try:
        with reader.opened(encoded.tobytes()) as image:
            if image.mode not in modes:
                raise ValueError(f"has the mode {image.mode}")
            image.load()
            return np.array(image)
    except ValueError:
        raise
    except Exception as error:  # on hostile bytes PIL raises SyntaxError, OSError, KeyError, ...
        raise ValueError(str(error) or type(error).__name__) from error


def images_below(folder: Path) -> list[str]:
    """Paths of the images below a folder, sorted; none if there is no such folder."""
    return sorted(image_files.walk(str(folder)).names) if folder.is_dir() else []


def chosen(pairs: Sequence[Pair], folder: Path, limit: int, cfg: Config) -> tuple[Pair, ...]:
    """A seeded sample of at most `limit` pairs (0: all) whose files are there.

    ValueError if there is no pair, or for a file that is missing.
    """
    if not pairs:
        raise ValueError(f"{str(folder)!r} has no image in one of its splits; add images and maps")
    names = [name for pair in pairs for name in pair]
    if lost := sample_files.missing(folder, names):
        raise ValueError(
            f"{len(lost)} of {len(names)} images and maps are missing below {str(folder)!r}, first"
            f" {printable(lost[0])!r}; copy them, or remove the others of their pairs"
        )
    return tuple(pairs[at] for at in sample_files.sampled(len(pairs), limit, cfg.seed).tolist())


def check_headers(pairs: Sequence[Pair], folder: Path, limits: Data, modes: frozenset[str]) -> None:
    """Raise ValueError unless each map is a PNG of one of the modes and has its image's size.

    A pair of which a header cannot be read passes: it is left out when it is read.
    """
    check = partial(problem_of, folder=folder, limits=limits, modes=modes)
    if problem := next(filter(None, mapped_ahead(check, pairs, ahead=64)), ""):
        raise ValueError(problem)


def problem_of(pair: Pair, *, folder: Path, limits: Data, modes: frozenset[str]) -> str:
    """The reason why a pair cannot be used, as a sentence; empty if it can, or is unreadable."""
    try:
        files = folder / pair.map, folder / pair.image
        encoded, of_image = (sample_files.encoded_bytes(file, limits) for file in files)
        size, image_size = (reader.measure(x, limits.max_megapixels) for x in (encoded, of_image))
        with reader.opened(encoded.tobytes()) as image:
            kind, mode = image.format, image.mode
    except (OSError, ValueError):
        return ""
    where = repr(printable(folder / pair.map))
    if kind != "PNG" or mode not in modes:
        bits = 8 if modes is BITS_8 else 16
        return f"{where} is a {kind} of mode {mode}; save it as a PNG of one channel of {bits} bits"
    if size != image_size:
        sizes = [f"{width} x {height}" for width, height in (size, image_size)]
        return f"{where} has {sizes[0]} pixels, and its image {sizes[1]}; make them equal"
    return ""
