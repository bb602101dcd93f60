"""Linear depth on frozen tokens, as of NYU depth v2 (arXiv 2304.07193, 2408.05088).

A 1x1 convolution maps each patch token, beside the CLS token, to scores of 256 depths; their mean
is the depth. Heads of several learning rates are trained at once, and one is chosen on a hold-out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from unic_ds import dist, rng
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.dense_head import (
    BATCH,
    REMEDY,
    Crop,
    CropModel,
    TrainingCrops,
    crop_models,
    reduced,
    say_unread,
    steps_of,
)
from unic_ds.evaluate.depth_head import (
    BINS,
    FARTHEST,
    NEAREST,
    RATES,
    STEPS,
    DepthHeads,
    checked_width,
    known,
    loss_grads,
    loss_sums,
    only_mean,
)
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.samples import DepthImage, SampleSet
from unic_ds.evaluate.sliding import (
    Windows,
    at_size,
    resized,
    rounds,
    scaled_size,
    slide,
    stride_of,
)

SIDE = 480
HELD_OUT, MOST_HELD_OUT = 0.05, 654
"""Part of the training images on which the rate is chosen, and their most: those of the test."""
EIGEN_SIZE, EIGEN_ROWS, EIGEN_COLUMNS = (480, 640), slice(45, 471), slice(41, 601)
"""The crop that NYU is scored on (arXiv 1406.2283)."""
NEEDS: frozenset[ModelOutput] = frozenset({"cls", "patch"})
METRICS = ("RMSE", "abs_rel", "a1", "a2", "a3")


class Depth:
    """Errors of a linear depth head, means over the images' own."""

    model_needs = NEEDS
    data_needs: frozenset[Annotation] = frozenset({"depth"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `depth RMSE` (m), `depth abs_rel`, and `depth a1` to `a3` (%) of each model."""
        train, val = data.samples("train"), data.samples("val")
        steps = steps_of(data.options.head_images, STEPS)
        held_N, kept_N = hold_out(len(train), data.seed)
        with crop_models(models, data.options.size or SIDE) as crops:
            heads, unread = train_heads(crops, train, kept_N, steps, data)
            tried = errors(crops, heads, train, held_N, data, flips=False)
            at_M = [best_rate(error_R5[:, 0]) for error_R5 in tried.error_MR5]
            tested = errors(crops, heads, val, np.arange(len(val)), data, chosen_M=at_M)
        shown = f"{len(kept_N) - unread}/{tested.images} images"
        grid = ",".join(f"{rate:g}" for rate in RATES)
        for crop, at, error_15 in zip(crops, at_M, tested.error_MR5, strict=True):
            protocol = (
                f"depth last block CLS + patch, x4, {BINS} bins, SigLoss, AdamW {RATES[at]:g} of"
                f" {grid} on {tried.images} held out, {steps} steps of {BATCH} crops,"
                f" {crop.described}, slide {crop.side}/{stride_of(crop.side)}, flip, Eigen crop of"
                f" 480x640, {NEAREST:g}-{FARTHEST:g} m, {shown} {crop.model.size} px"
            )
            for name, value in zip(METRICS, error_15[0].tolist(), strict=True):
                score = Score(crop.model.name, f"depth {name}", value, protocol)
                if name == "RMSE":
                    score = score._replace(unit="m", better="lower")
                elif name == "abs_rel":
                    score = score._replace(unit="", better="lower")
                yield score


def hold_out(count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places on which the rate is chosen, and those to train on; ValueError for a single image.

    The first are consecutive from a seeded place, so that frames of one film stay together.
    """
    if count < 2:
        raise ValueError("a depth head wants two training images or more; add images")
    held = min(MOST_HELD_OUT, max(1, round(HELD_OUT * count)))
    first = int(rng.uniform(seed, "depth hold-out", 1, 0)[0] * count)
    place_N = (first + np.arange(count)) % count
    return np.sort(place_N[:held]), np.sort(place_N[held:])


def best_rate(rmse_R: Tensor) -> int:
    """Place of the smallest error; a head whose training has diverged is not chosen."""
    return int(rmse_R.nan_to_num(torch.inf).argmin())


def train_heads(
    crops: Sequence[CropModel],
    train: SampleSet[DepthImage],
    place_N: NDArray[np.int64],
    steps: int,
    data: EvalData,
) -> tuple[list[DepthHeads], int]:
    """Trained heads of each model, and the number of training images that cannot be read."""
    source = TrainingCrops(train, place_N, cut_crop, 6, torch.tensor(0.0), data.seed, "depth")
    heads: list[DepthHeads] = []
    pixels = torch.zeros((), dtype=torch.float64, device=data.device)
    sides = [crop.side for crop in crops]
    for step, batch in enumerate(source.batches(steps, sides, data.device)):
        with raised_on_all_ranks("the depth heads", REMEDY):
            parts = []
            for at, crop in enumerate(crops):
                image_B3SS, depth_BSS = batch.crops[crop.side]
                tokens = crop.tokens(image_B3SS, NEEDS, batch=data.options.batch)
                if len(heads) == at:
                    width = checked_width(tokens, crop.model.name)
                    made = DepthHeads(width, seed=data.seed, steps=steps)
                    heads.append(made.to(data.device))
                parts.append(loss_sums(heads[at], crop, tokens, depth_BSS))
        sums = reduced([part.sum_3R for part in parts])
        grads = iter(reduced([grad for part in parts for grad in part.grads]))
        for head, sum_3R, part in zip(heads, sums, parts, strict=True):
            pixels += sum_3R[0, 0]
            pairs = [next(grads) for _ in part.grads]
            head.step(loss_grads(sum_3R, pairs, only_mean=only_mean(step, steps=steps)))
    if not float(pixels):
        raise ValueError(f"no known depth of {train.name!r} can be read; check its depth maps")
    return heads, say_unread(train, source.unread)


def cut_crop(sample: DepthImage, draw_K: NDArray[np.float64], side: int) -> Crop:
    """Resize the shorter side to the crop's, crop, flip, change gamma, brightness and colour.

    The colours are BTS's (arXiv 1907.10326).
    """
    along, flip, gamma, *colours = draw_K.tolist()
    height, width = scaled_size(sample.depth_HW.shape, side)
    height, width = max(height, side), max(width, side)
    image_3HW = resized(sample.image_3HW, (height, width))
    depth_HW: Tensor = V.resize(
        sample.depth_HW[None], [height, width], interpolation=InterpolationMode.NEAREST
    )[0]
    y, x = int(along * (height - side + 1)), int(along * (width - side + 1))
    image_3SS, depth_SS = (
        found[..., y : y + side, x : x + side] for found in (image_3HW, depth_HW)
    )
    if flip < 0.5:
        image_3SS, depth_SS = image_3SS.flip(2), depth_SS.flip(1)
    factor_3 = (0.9 + 0.2 * torch.tensor(colours, dtype=torch.float32)).view(3, 1, 1)
    return Crop(recoloured(image_3SS, 0.9 + 0.2 * gamma, factor_3), depth_SS)


def recoloured(image_3HW: Tensor, gamma: float, factor_311: Tensor) -> Tensor:
    """A uint8 image to a power, and times a factor of each colour."""
    changed_3HW = (image_3HW.float() / 255).pow_(gamma) * factor_311
    return (changed_3HW * 255).round_().clamp_(0, 255).to(torch.uint8)


class Errors(NamedTuple):
    """Errors over a set of images."""

    error_MR5: Tensor
    """By model and rate, in the order of `METRICS`: means over the images."""
    images: int
    """Images that have a known depth and can be read."""


def errors(
    crops: Sequence[CropModel],
    heads: Sequence[DepthHeads],
    samples: SampleSet[DepthImage],
    place_N: NDArray[np.int64],
    data: EvalData,
    *,
    chosen_M: Sequence[int] | None = None,
    flips: bool = True,
) -> Errors:
    """Errors of all rates, or of one of each model; `flips`: averaged with the mirrored image's.

    ValueError, on every rank, if no image has a known depth.
    """
    rates = len(RATES) if chosen_M is None else 1
    sum_MR6 = torch.zeros(len(crops), rates, 6, dtype=torch.float64, device=data.device)
    unread: dict[int, str] = {}
    batch, sides = data.options.batch, [crop.side for crop in crops]
    for group in rounds(samples, place_N.tolist(), sides, batch=batch, unread=unread):
        for at, (crop, head) in enumerate(zip(crops, heads, strict=True)):
            images = [shown.images[crop.side] for shown in group]
            rate = slice(None) if chosen_M is None else slice(chosen_M[at], chosen_M[at] + 1)
            found = [
                slide(crop, side, partial(head.predict, rate=rate), data=data, needs=NEEDS)
                for side in (images, [x.flip(2) for x in images])[: 1 + flips]
            ]
            with raised_on_all_ranks("the depth test", REMEDY), torch.no_grad():
                for shown, *windows in zip(group, *found, strict=True):
                    true_HW = shown.sample.depth_HW.to(data.device)
                    sum_MR6[at] += image_errors(averaged(windows, true_HW), true_HW)
    sum_MR6 = dist.all_reduce_sum(sum_MR6).cpu()
    say_unread(samples, unread)
    count = int(sum_MR6[0, 0, 5])
    if not count:
        raise ValueError(
            f"no image of {samples.name!r} that can be read has a depth between {NEAREST:g} and"
            f" {FARTHEST:g} m; check that its maps are in mm"
        )
    return Errors(sum_MR6[..., :5] / count, count)


def averaged(windows: Sequence[Windows], true_HW: Tensor) -> Tensor:
    """Depths (R, H, W) at the size of a map, by an image's windows and its mirror image's."""
    pred_RHW, *mirrored = (found.merged() for found in windows)
    if mirrored:
        pred_RHW = (pred_RHW + mirrored[0].flip(2)) / 2
    return at_size(pred_RHW, tuple(true_HW.shape))


def image_errors(pred_RHW: Tensor, true_HW: Tensor) -> Tensor:
    """`METRICS` of one image, and a 1 (R, 6, fp64); zeros for an image without known depth.

    Ratios are in %: parts of the pixels within a factor of 1.25, of its square and of its cube.
    """
    known_HW = known(true_HW)
    if tuple(true_HW.shape) == EIGEN_SIZE:
        inside_HW = torch.zeros_like(known_HW)
        inside_HW[EIGEN_ROWS, EIGEN_COLUMNS] = True
        known_HW &= inside_HW
    if not known_HW.any():
        return pred_RHW.new_zeros(len(pred_RHW), 6, dtype=torch.float64)
    true_P = true_HW[known_HW].double()
    pred_RP = pred_RHW[:, known_HW].double().clamp(NEAREST, FARTHEST)
    gap_RP = pred_RP - true_P
    ratio_RP = torch.maximum(pred_RP / true_P, true_P / pred_RP)
    rows = [gap_RP.square().mean(1).sqrt(), (gap_RP.abs() / true_P).mean(1)]
    rows += [100 * (ratio_RP < 1.25**power).double().mean(1) for power in (1, 2, 3)]
    return torch.stack([*rows, torch.ones_like(rows[0])], 1)
