"""Training of heads on frozen patch tokens: crops that all models share, and sums over the ranks.

An image is decoded once for all models. A step has the same crops on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from math import isqrt
from typing import Any, Generic, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist, rng
from unic_ds.evaluate.features import Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.samples import Annotated, SampleSet, UnreadableImage, mapped_ahead
from unic_ds.evaluate.squares import padded
from unic_ds.files.printable import printable
from unic_ds.process import console

BATCH = 16
"""Crops of an optimiser step on all ranks together."""
LISTED = 20
"""Unreadable images that are named in the log."""
REMEDY = "lower --eval.size or --eval.batch"


class TokenMap(NamedTuple):
    """Tokens of a batch of crops, fp32."""

    map_BCHW: Tensor
    cls_BC: Tensor | None


@dataclass(frozen=True)
class CropModel:
    """A model with square crops of `side` px, padded on all sides if it encodes larger ones."""

    model: Model
    side: int

    def tokens(self, crop_B3SS: Tensor, needs: frozenset[ModelOutput], *, batch: int) -> TokenMap:
        """Tokens of uint8 crops, `batch` at a time.

        ValueError for patch tokens without a square grid, and for values that are not finite.
        """
        image_B3HW = padded(crop_B3SS, self.model.size, centred=True)
        with torch.no_grad():
            found = [self.model.encode(part, needs) for part in image_B3HW.split(batch)]
            patch_BNC = joined([out.patch_BNC for out in found])
            cls_BC = joined([out.cls_BC for out in found]) if "cls" in needs else None
        name, grid = self.model.name, isqrt(patch_BNC.shape[1])
        if grid * grid != patch_BNC.shape[1]:
            raise ValueError(
                f"{name!r} has {patch_BNC.shape[1]} patch tokens, which form no square grid;"
                " leave the model or the task out"
            )
        if not all(x is None or x.isfinite().all() for x in (patch_BNC, cls_BC)):
            raise ValueError(f"features of {name!r} are NaN or infinite; leave the model out")
        return TokenMap(patch_BNC.transpose(1, 2).unflatten(2, (grid, grid)), cls_BC)

    def at_pixels(self, value_BKHW: Tensor) -> Tensor:
        """Values on a grid of the encoded image, resized bilinearly to the crop's pixels (BKSS)."""
        size = self.model.size
        value_BKSS = F.interpolate(value_BKHW, (size, size), mode="bilinear", align_corners=False)
        first = (size - self.side) // 2
        inside = slice(first, first + self.side)
        return value_BKSS[..., inside, inside]

    @property
    def described(self) -> str:
        """Side of the crops, and that of the images if they are padded: `512 px padded to 518`."""
        more = f" padded to {self.model.size}" if self.model.size > self.side else ""
        return f"{self.side} px{more}"


def joined(parts: Sequence[Tensor | None]) -> Tensor:
    """Tokens in one fp32 tensor that autograd may save, unlike one made in inference mode."""
    known = [part.float() for part in parts if part is not None]
    assert len(known) == len(parts), "the model does not give what it says"
    return torch.cat(known) if len(known) > 1 else known[0].clone()


@contextmanager
def crop_models(models: Sequence[Model], side: int) -> Iterator[list[CropModel]]:
    """Context manager of the models for crops of `side` px; a model of one side keeps its own.

    A side that is no multiple of a model's patch is padded to the next one.
    """
    found: list[CropModel] = []
    try:
        for model in models:
            size = -(-side // model.patch) * model.patch if model.patch else side
            if model.at is None:
                found.append(CropModel(model, side if size == model.size else model.size))
            else:
                found.append(CropModel(model if size == model.size else model.at(size), side))
        yield found
    finally:
        for model, crop in zip(models, found, strict=False):
            if crop.model is not model and crop.model.frees:
                crop.model.frees()


class Crop(NamedTuple):
    """A square crop of a sample for one step."""

    image_3SS: Tensor
    """uint8 RGB."""
    target_SS: Tensor


class CropBatch(NamedTuple):
    """This rank's crops of one step on the device."""

    crops: Mapping[int, tuple[Tensor, Tensor]]
    """Side in pixels -> uint8 images (B, 3, S, S) and targets (B, S, S)."""
    counted_B: Tensor
    """False for a filler: an image that cannot be read, or that keeps the ranks' counts equal."""


@dataclass
class TrainingCrops(Generic[Annotated]):
    """Random crops of the samples at some places, in a seeded order of each epoch."""

    samples: SampleSet[Annotated]
    place_N: NDArray[np.int64]
    cut: Callable[[Annotated, NDArray[np.float64], int], Crop]
    """Crop of a sample from `draws` uniform numbers in [0, 1) and a side in pixels."""
    draws: int
    blank: Tensor
    """Target of a filler's pixels: a scalar."""
    seed: int
    stream: str
    """Name of the stream of random numbers."""
    unread: dict[int, str] = field(default_factory=dict)
    """Place -> reason, of images on this rank that cannot be read."""

    def batches(
        self, steps: int, sides: Sequence[int], device: torch.device
    ) -> Iterator[CropBatch]:
        """This rank's share of each step at all sides; every rank calls it."""
        sides = tuple(dict.fromkeys(sides))
        rows = -(-BATCH // dist.world())

        def cut(slot: tuple[int, int] | None) -> dict[int, Crop] | None:
            return self._crops(*slot, sides) if slot else None

        shown = mapped_ahead(cut, self._slots(steps, rows), ahead=2 * rows)
        for _ in console.track(range(steps), steps, f"training {self.stream} heads"):
            with raised_on_all_ranks(f"the images of {self.stream}", REMEDY):
                found = list(islice(shown, rows))
                batch = self._stacked(found, sides, device)
            yield batch

    def _slots(self, steps: int, rows: int) -> Iterator[tuple[int, int] | None]:
        """(number of the crop, place of its sample) of this rank's rows; None for a filler."""
        count, epoch, order_N = len(self.place_N), -1, self.place_N
        for step in range(steps):
            for row in range(dist.rank(), rows * dist.world(), dist.world()):
                if row >= BATCH:
                    yield None
                    continue
                number = step * BATCH + row
                if number // count != epoch:
                    epoch = number // count
                    key_N = rng.random_bits(
                        self.seed, f"{self.stream} order", 1, epoch, np.arange(count)
                    )[:, 0]
                    order_N = self.place_N[np.argsort(key_N, kind="stable")]
                yield number, int(order_N[number % count])

    def _crops(self, number: int, place: int, sides: Sequence[int]) -> dict[int, Crop] | None:
        """Crops of one sample by side; None if it cannot be read."""
        try:
            sample = self.samples.read(place)
        except UnreadableImage as error:
            self.unread[place] = str(error)
            return None
        draw_K = rng.uniform(self.seed, f"{self.stream} crops", self.draws, number)
        return {side: self.cut(sample, draw_K, side) for side in sides}

    def _stacked(
        self, rows: Sequence[dict[int, Crop] | None], sides: Sequence[int], device: torch.device
    ) -> CropBatch:
        """Crops as a batch, with fillers for those that are missing."""
        crops = {}
        for side in sides:
            blank = Crop(padded(torch.empty(3, 0, 0, dtype=torch.uint8), side), self.blank)
            found = [row[side] if row else blank for row in rows]
            image_B3SS = torch.stack([crop.image_3SS for crop in found])
            target_BSS = torch.stack([crop.target_SS.expand(side, side) for crop in found])
            crops[side] = image_B3SS.to(device), target_BSS.to(device)
        return CropBatch(crops, torch.tensor([row is not None for row in rows], device=device))


def reduced(parts: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the ranks of tensors of one type, in one collective."""
    flat = dist.all_reduce_sum(torch.cat([part.flatten() for part in parts]))
    sums = flat.split([part.numel() for part in parts])
    return [found.view_as(part) for found, part in zip(sums, parts, strict=True)]


def steps_of(images: int, published: int) -> int:
    """Optimiser steps for a head that sees so many images (0: `published` steps), at least 1."""
    return max(1, images // BATCH) if images else published


def warm_up(step: int, *, steps: int, first: float) -> float:
    """Factor of the rate in step `step` from 0: linear from `first` to 1 after `steps`."""
    return min(1.0, first + (1 - first) * step / max(steps, 1))


def say_unread(samples: SampleSet[Any], unread: Mapping[int, str]) -> int:
    """Number of images that a rank could not read; they are printed. Every rank calls it."""
    every: dict[int, str] = {}
    for found in dist.all_gather_objects(dict(unread)):
        every |= found
    if every:
        rows = [f"  {printable(every[place])}" for place in sorted(every)]
        more = [f"  and {len(rows) - LISTED} more"] if len(rows) > LISTED else []
        head = f"{len(every)} of {len(samples)} images of {printable(samples.name)} are left out:"
        console.say("\n".join([head, *rows[:LISTED], *more]))
    return len(every)
