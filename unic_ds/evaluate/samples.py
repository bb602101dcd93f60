"""Images at their own size with dense annotations, for tasks that train a head or match pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from unic_ds import dist

IGNORED = 255
"""Class of a pixel that counts neither in training nor in the score."""


class MaskedImage(NamedTuple):
    """An image with a class per pixel."""

    image_3HW: Tensor
    """uint8 RGB, upright, at its own size, as in all samples."""
    mask_HW: Tensor
    """uint8 classes from 0; IGNORED for none."""


class DepthImage(NamedTuple):
    """An image with a depth map."""

    image_3HW: Tensor
    depth_HW: Tensor
    """fp32 metres; 0 for unknown."""


class BoxedImage(NamedTuple):
    """An image with instances of objects."""

    image_3HW: Tensor
    box_M4: Tensor
    """fp32 pixels x0, y0, x1, y1."""
    class_M: Tensor
    """int64 classes from 0."""
    crowd_M: Tensor
    """bool: a region of many objects, not counted as one."""
    mask_MHW: Tensor | None = None
    """bool masks of the instances, if the set has them."""


class ImagePair(NamedTuple):
    """Two images with keypoints that correspond, in the same order."""

    source_3HW: Tensor
    target_3HW: Tensor
    source_K2: Tensor
    """fp32 pixels x, y."""
    target_K2: Tensor
    target_box_4: Tensor
    """fp32 x0, y0, x1, y1 of the object in the target image."""
    category: str


Annotated = TypeVar("Annotated", MaskedImage, DepthImage, BoxedImage, ImagePair, covariant=True)


class UnreadableImage(ValueError):
    """An image or its annotation cannot be read; the text names the file and the reason."""


class SampleSet(Protocol[Annotated]):
    """Samples of one kind, by their place; every rank can read all of them."""

    @property
    def annotations(self) -> frozenset[Any]:
        """Kinds of annotation that its samples have (`features.Annotation`)."""

    @property
    def name(self) -> str:
        """Name of the set in the table, such as its folder's."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""

    @property
    def identity(self) -> str:
        """Hash of names, sizes and times of its files, and of its annotations; all ranks ask."""

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, place: int) -> Annotated:
        """Decode one sample; UnreadableImage if it cannot be read. Threads may call it at once."""


Item = TypeVar("Item")
Result = TypeVar("Result")


def mapped_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 0, ahead: int = 16
) -> Iterator[Result]:
    """Results of `function` in order; threads compute at most `ahead` of them in advance."""
    left = iter(items)
    with ThreadPoolExecutor(threads or dist.cores(), thread_name_prefix="unic_ds-samples") as pool:
        flight = [pool.submit(function, item) for item in islice(left, ahead)]
        while flight:
            yield flight.pop(0).result()
            flight += [pool.submit(function, item) for item in islice(left, 1)]


def share(places: Sequence[int]) -> Sequence[int]:
    """This rank's part of `places`, dealt in turn; the lengths of two ranks differ by at most 1."""
    return places[dist.rank() :: dist.world()]
