"""Sliding-window inference: predictions of square windows, averaged where the windows overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Generic, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from unic_ds import dist
from unic_ds.evaluate.dense_head import REMEDY, CropModel, TokenMap
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.samples import Annotated, SampleSet, UnreadableImage, mapped_ahead, share
from unic_ds.evaluate.squares import padded
from unic_ds.process import console

LONGEST = 4
"""Longer side of a resized image, in shorter sides; a longer image is resized to less."""
WINDOWS = 4
"""Windows that an image is expected to have, for the number of images that are held at once."""


def stride_of(side: int) -> int:
    """Distance between windows: 341 px for 512 (two thirds)."""
    return max(1, round(side * 341 / 512))


def scaled_size(size: Sequence[int], short: float) -> tuple[int, int]:
    """(height, width) of an image whose shorter side becomes `short`, within `LONGEST`."""
    height, width = size
    factor = min(short / min(size), LONGEST * short / max(size))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resized(image_3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image, resized bilinearly with antialiasing."""
    if tuple(image_3HW.shape[-2:]) == size:
        return image_3HW
    found_3HW: Tensor = V.resize(image_3HW, list(size), antialias=True)
    return found_3HW


def window_corners(size: Sequence[int], side: int) -> list[tuple[int, int]]:
    """Top left corners (y, x) of the windows of an image; the last ones end at its border."""
    height, width = size
    return [(y, x) for y in starts(height, side) for x in starts(width, side)]


def starts(length: int, side: int) -> list[int]:
    """First pixels of the windows along one side of an image."""
    stride = stride_of(side)
    count = max(0, -(-(length - side) // stride)) + 1
    return [max(0, min(i * stride, length - side)) for i in range(count)]


class Shown(NamedTuple, Generic[Annotated]):
    """A sample, and its image by the side of the windows: the shorter side has that length."""

    sample: Annotated
    images: dict[int, Tensor]


def rounds(
    samples: SampleSet[Annotated],
    places: Sequence[int],
    sides: Sequence[int],
    *,
    batch: int,
    unread: dict[int, str],
) -> Iterator[list[Shown[Annotated]]]:
    """This rank's share of the samples, some at a time: equally many rounds on every rank.

    An image that cannot be read is left out and noted in `unread`.
    """
    size = max(1, batch // WINDOWS)
    sides = tuple(dict.fromkeys(sides))

    def show(place: int) -> Shown[Annotated] | None:
        try:
            sample = samples.read(place)
        except UnreadableImage as error:
            unread[place] = str(error)
            return None
        image_3HW: Tensor = sample[0]
        size = image_3HW.shape[-2:]
        scaled = {side: resized(image_3HW, scaled_size(size, side)) for side in sides}
        return Shown(sample, scaled)

    shown = mapped_ahead(show, share(places))
    count = -(-len(places) // (dist.world() * size))
    for _ in console.track(range(count), count, f"testing on {samples.name}"):
        with raised_on_all_ranks(f"the images of {samples.name!r}", REMEDY):
            group = [found for found in islice(shown, size) if found]
        yield group


class Windows(NamedTuple):
    """Predictions of the windows of one image."""

    crop: CropModel
    value_MKHW: Tensor
    """Values on the grid of each window."""
    corners: Sequence[tuple[int, int]]
    size: tuple[int, ...]
    """Height and width of the image."""

    def merged(self) -> Tensor:
        """Values (K, H, W) at the image's pixels: the mean of the windows that cover a pixel."""
        side, (height, width) = self.crop.side, self.size
        shape = (self.value_MKHW.shape[1], max(height, side), max(width, side))
        sum_KHW = self.value_MKHW.new_zeros(shape)
        count_HW = torch.zeros_like(sum_KHW[0])
        for value_KHW, (y, x) in zip(self.value_MKHW, self.corners, strict=True):
            sum_KHW[:, y : y + side, x : x + side] += self.crop.at_pixels(value_KHW[None])[0]
            count_HW[y : y + side, x : x + side] += 1
        return sum_KHW.div_(count_HW)[:, :height, :width]


def slide(
    crop: CropModel,
    images: Sequence[Tensor],
    predict: Callable[[TokenMap], Tensor],
    *,
    data: EvalData,
    needs: frozenset[ModelOutput],
) -> list[Windows]:
    """Predictions of the windows of uint8 images on the CPU; every rank calls it.

    `predict` maps the tokens of B windows to values on a grid of the window (B, K, h, w). All ranks
    encode equally often, as a model may have collectives.
    """
    side, batch = crop.side, data.options.batch
    corners = [window_corners(image.shape[-2:], side) for image in images]
    cut = [
        padded(image_3HW[:, y : y + side, x : x + side], side)
        for image_3HW, found in zip(images, corners, strict=True)
        for y, x in found
    ]
    filler = padded(torch.empty(3, 0, 0, dtype=torch.uint8), side)
    parts: list[Tensor] = []
    for at in range(0, max(dist.all_gather_objects(len(cut))), batch):
        with raised_on_all_ranks(f"the windows of {crop.model.name!r}", REMEDY), torch.no_grad():
            window_B3SS = torch.stack(cut[at : at + batch] or [filler]).to(data.device)
            found_BKHW = predict(crop.tokens(window_B3SS, needs, batch=batch))
            parts.append(found_BKHW[: len(cut[at : at + batch])])
    value_MKHW = torch.cat(parts) if parts else torch.empty(0)
    per_image = value_MKHW.split([len(found) for found in corners])
    return [
        Windows(crop, part_MKHW, found, tuple(image.shape[-2:]))
        for image, found, part_MKHW in zip(images, corners, per_image, strict=True)
    ]


def at_size(value_KHW: Tensor, size: tuple[int, ...]) -> Tensor:
    """Values resized bilinearly to (height, width)."""
    if tuple(value_KHW.shape[1:]) == size:
        return value_KHW
    return F.interpolate(value_KHW[None], size, mode="bilinear", align_corners=False)[0]
