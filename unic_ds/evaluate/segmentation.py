"""Linear segmentation on frozen patch tokens, as of ADE20K and VOC (arXiv 2304.07193, 2408.05088).

BatchNorm and a 1x1 convolution are trained on the last block's tokens; the test slides a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from unic_ds import dist, rng
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.dense_head import (
    BATCH,
    REMEDY,
    Crop,
    CropModel,
    TokenMap,
    TrainingCrops,
    crop_models,
    reduced,
    say_unread,
    steps_of,
    warm_up,
)
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.samples import IGNORED, MaskedImage, SampleSet
from unic_ds.evaluate.sliding import at_size, resized, rounds, scaled_size, slide, stride_of
from unic_ds.evaluate.squares import padded

SIDE = 512
STEPS = 40_000
WARM_UP = 1_500
RATE, DECAY = 1e-3, 1e-4
SCALES = (0.5, 2.0)
"""Range of the training images' shorter side, in crops."""
MOST_OF_CLASS = 0.75
"""Part of a crop's labelled pixels that one class may have; otherwise it is drawn again."""
TRIES = 10
DRAWS = 2 + 2 * TRIES + 9
"""Scale, flip, corners of the tries, photometric distortion."""
VALUES = 2**26
"""Logits at pixels that are held at once: 256 MB, and as much again for each temporary."""
NEEDS: frozenset[ModelOutput] = frozenset({"patch"})


class Segmentation:
    """Mean intersection over union, and pixel accuracy, in % of a linear segmentation head."""

    model_needs = NEEDS
    data_needs: frozenset[Annotation] = frozenset({"masks"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `segmentation mIoU` and `segmentation accuracy` of each model."""
        train, val = data.samples("train"), data.samples("val")
        steps = steps_of(data.options.head_images, STEPS)
        with crop_models(models, data.options.size or SIDE) as crops:
            heads, unread = train_heads(crops, train, steps, data)
            counts_M3K, unread_val = count_pixels(crops, heads, val, data)
        images = f"{len(train) - unread}/{len(val) - unread_val} images"
        for crop, count_3K in zip(crops, counts_M3K, strict=True):
            protocol = (
                f"segmentation last block BatchNorm + 1x1 conv, AdamW {RATE:g}, {steps} steps of"
                f" {BATCH} crops, {crop.described}, slide {crop.side}/{stride_of(crop.side)},"
                f" {count_3K.shape[1]} classes, {images} {crop.model.size} px"
            )
            iou, accuracy = measures(count_3K)
            yield Score(crop.model.name, "segmentation mIoU", iou, protocol)
            yield Score(crop.model.name, "segmentation accuracy", accuracy, protocol)


class SegmentationHead(nn.Module):
    """BatchNorm over all ranks and a 1x1 convolution; its tokens have no gradient.

    The moments are constants of the loss, since no parameter is in front of them.
    """

    mean_C: Tensor
    var_C: Tensor

    def __init__(self, width: int, classes: int, *, seed: int, steps: int):
        super().__init__()
        generator = torch.Generator().manual_seed(rng.seed_for(seed, "segmentation head"))
        weight_KC = torch.randn(classes, width, generator=generator) * 0.01
        self.scale_C, self.shift_C = nn.Parameter(torch.ones(width)), nn.Parameter(weight_KC[0] * 0)
        self.weight_KC, self.bias_K = nn.Parameter(weight_KC), nn.Parameter(torch.zeros(classes))
        self.register_buffer("mean_C", torch.zeros(width))
        self.register_buffer("var_C", torch.ones(width))
        self.optimiser = torch.optim.AdamW(self.parameters(), RATE, weight_decay=DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, partial(rate_factor, steps=steps)
        )

    def forward(self, map_BCHW: Tensor, mean_C: Tensor, var_C: Tensor) -> Tensor:
        """Logits (B, K, H, W) on the grid of the tokens."""
        x_BCHW = F.batch_norm(map_BCHW, mean_C, var_C, self.scale_C, self.shift_C)
        return F.conv2d(x_BCHW, self.weight_KC[:, :, None, None], self.bias_K)

    def predict(self, tokens: TokenMap) -> Tensor:
        """Logits by the running moments."""
        logits_BKHW: Tensor = self(tokens.map_BCHW, self.mean_C, self.var_C)
        return logits_BKHW

    def normal(self, moments_N: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance by the moments of all ranks, which the running ones follow."""
        count, sum_C, square_C = moments_N.split([1, *[len(self.mean_C)] * 2])
        count = count.clamp(min=2)  # a step without any image
        mean_C = sum_C / count
        var_C = (square_C / count - mean_C.square()).clamp(min=0)
        self.mean_C.lerp_(mean_C.float(), 0.1)
        self.var_C.lerp_((var_C * count / (count - 1)).float(), 0.1)
        return mean_C.float(), var_C.float()

    def step(self, grads: Sequence[Tensor]) -> None:
        """Update the parameters."""
        for parameter, grad in zip(self.parameters(), grads, strict=True):
            parameter.grad = grad
        self.optimiser.step()
        self.schedule.step()


def rate_factor(step: int, *, steps: int) -> float:
    """Factor of the rate: linear warm-up, and linear decay to 0."""
    rise = warm_up(step, steps=round(steps * WARM_UP / STEPS), first=1e-6)
    return rise * max(0.0, 1 - step / steps)


def train_heads(
    crops: Sequence[CropModel], train: SampleSet[MaskedImage], steps: int, data: EvalData
) -> tuple[list[SegmentationHead], int]:
    """A trained head of each model, and the number of training images that cannot be read."""
    source = TrainingCrops(
        train, np.arange(len(train)), cut_crop, DRAWS, torch.tensor(IGNORED, dtype=torch.uint8),
        data.seed, "segmentation",
    )  # fmt: skip
    sides = [crop.side for crop in crops]
    heads: list[SegmentationHead] = []
    pixels = torch.zeros((), device=data.device)
    for batch in source.batches(steps, sides, data.device):
        with raised_on_all_ranks("the segmentation heads", REMEDY):
            maps = [
                crop.tokens(batch.crops[crop.side][0], NEEDS, batch=data.options.batch).map_BCHW
                for crop in crops
            ]
            moments = [moments_of(map_BCHW[batch.counted_B]) for map_BCHW in maps]
            if not heads:
                heads = [
                    SegmentationHead(
                        found.shape[1], len(train.classes), seed=data.seed, steps=steps
                    ).to(data.device)
                    for found in maps
                ]
        normals = [h.normal(found) for h, found in zip(heads, reduced(moments), strict=True)]
        with raised_on_all_ranks("the segmentation heads", REMEDY):
            parts = [
                loss_sums(head, crop, map_BCHW, normal, batch.crops[crop.side][1])
                for head, crop, map_BCHW, normal in zip(heads, crops, maps, normals, strict=True)
            ]
        sums = reduced([x for part in parts for x in part])
        for head, at in zip(heads, range(0, len(sums), len(parts[0])), strict=True):
            count, *grads = sums[at : at + len(parts[0])]
            pixels += count
            head.step([grad / count.clamp(min=1) for grad in grads])
    if not float(pixels):
        raise ValueError(f"no labelled pixel of {train.name!r} can be read; check its masks")
    return heads, say_unread(train, source.unread)


def moments_of(map_BCHW: Tensor) -> Tensor:
    """Count, sums and sums of squares of the tokens (1 + 2C, fp64)."""
    x_MC = map_BCHW.transpose(0, 1).flatten(1).T
    count = x_MC.new_tensor([len(x_MC)], dtype=torch.float64)
    return torch.cat([count, *(x.sum(0, dtype=torch.float64) for x in (x_MC, x_MC.square()))])


def loss_sums(
    head: SegmentationHead,
    crop: CropModel,
    map_BCHW: Tensor,
    normal: tuple[Tensor, Tensor],
    mask_BSS: Tensor,
) -> list[Tensor]:
    """Labelled pixels of this rank, and the gradient of their summed cross-entropy.

    The loss at pixels is taken of some crops at a time.
    """
    logits_BKHW = head(map_BCHW, *normal)
    leaf_BKHW = logits_BKHW.detach().requires_grad_()
    some = max(1, VALUES // (logits_BKHW.shape[1] * crop.side**2))
    for part_BKHW, part_BSS in zip(leaf_BKHW.split(some), mask_BSS.split(some), strict=True):
        at_pixels_BKSS = crop.at_pixels(part_BKHW)
        loss = F.cross_entropy(
            at_pixels_BKSS, part_BSS.long(), ignore_index=IGNORED, reduction="sum"
        )
        loss.backward()
    grads = torch.autograd.grad(logits_BKHW, list(head.parameters()), leaf_BKHW.grad)
    return [(mask_BSS != IGNORED).sum().float(), *grads]


def cut_crop(sample: MaskedImage, draw_K: NDArray[np.float64], side: int) -> Crop:
    """Scale, crop, flip and distort a sample; the padding has no class."""
    scale, flip, *rest = draw_K.tolist()
    corners, colours = rest[: 2 * TRIES], rest[2 * TRIES :]
    short = side * (SCALES[0] + (SCALES[1] - SCALES[0]) * scale)
    size = scaled_size(sample.mask_HW.shape, short)
    mask_HW: Tensor = V.resize(
        sample.mask_HW[None], list(size), interpolation=InterpolationMode.NEAREST
    )[0]
    y, x = chosen_corner(mask_HW, corners, side)
    image_3SS = resized(sample.image_3HW, size)[:, y : y + side, x : x + side]
    mask_SS = mask_HW[y : y + side, x : x + side]
    if flip < 0.5:
        image_3SS, mask_SS = image_3SS.flip(2), mask_SS.flip(1)
    edges = (0, side - mask_SS.shape[1], 0, side - mask_SS.shape[0])
    image_3SS = padded(distorted(image_3SS, colours), side)
    return Crop(image_3SS, F.pad(mask_SS, edges, value=IGNORED))


def chosen_corner(mask_HW: Tensor, draws: Sequence[float], side: int) -> tuple[int, int]:
    """Top left corner of the first crop in which no class has too large a part; else the last."""
    height, width = mask_HW.shape
    y = x = 0
    for row, column in zip(draws[::2], draws[1::2], strict=True):
        y, x = int(row * (max(height - side, 0) + 1)), int(column * (max(width - side, 0) + 1))
        count_K = mask_HW[y : y + side, x : x + side].flatten().bincount(minlength=256)
        count_K[IGNORED] = 0
        if 0 < int(count_K.max()) < MOST_OF_CLASS * int(count_K.sum()):
            break
    return y, x


def distorted(image_3HW: Tensor, draws: Sequence[float]) -> Tensor:
    """An image with torchvision's RandomPhotometricDistort, each part by a chance of a half.

    Its transform draws from the global random state, so its parts are called (arXiv 1512.02325).
    """
    contrast_first, brightness, contrast, saturation, hue, *sizes = draws
    parts = [
        (brightness, V.adjust_brightness, 0.875 + 0.25 * sizes[0]),
        (saturation, V.adjust_saturation, 0.5 + sizes[2]),
        (hue, V.adjust_hue, 0.1 * sizes[3] - 0.05),
    ]
    parts.insert(1 if contrast_first < 0.5 else 3, (contrast, V.adjust_contrast, 0.5 + sizes[1]))
    for chance, change, size in parts:
        if chance < 0.5:
            image_3HW = change(image_3HW, size)
    return image_3HW


def count_pixels(
    crops: Sequence[CropModel],
    heads: Sequence[SegmentationHead],
    val: SampleSet[MaskedImage],
    data: EvalData,
) -> tuple[Tensor, int]:
    """Counts of pixels of each model (M, 3, K), and the number of images that cannot be read.

    The three are those of class and prediction alike, of the prediction and of the class.
    """
    classes, batch = len(val.classes), data.options.batch
    count_M3K = torch.zeros(len(crops), 3, classes, dtype=torch.int64, device=data.device)
    unread: dict[int, str] = {}
    sides = [crop.side for crop in crops]
    for group in rounds(val, range(len(val)), sides, batch=batch, unread=unread):
        for at, (crop, head) in enumerate(zip(crops, heads, strict=True)):
            images = [shown.images[crop.side] for shown in group]
            found = slide(crop, images, head.predict, data=data, needs=NEEDS)
            with raised_on_all_ranks("the segmentation test", REMEDY), torch.no_grad():
                for shown, windows in zip(group, found, strict=True):
                    mask_HW = shown.sample.mask_HW.to(data.device)
                    pred_HW = classes_at(windows.merged(), tuple(mask_HW.shape))
                    count_M3K[at] += counts(pred_HW, mask_HW, classes)
    return dist.all_reduce_sum(count_M3K).cpu(), say_unread(val, unread)


def classes_at(logits_KHW: Tensor, size: tuple[int, ...], *, values: int = VALUES) -> Tensor:
    """Class of each pixel of an image of that size, with so many logits at a time."""
    some = max(1, values // (size[0] * size[1]))
    best_HW = logits_KHW.new_full(size, -torch.inf)
    class_HW = torch.zeros(size, dtype=torch.int64, device=logits_KHW.device)
    for first in range(0, len(logits_KHW), some):
        value_HW, place_HW = at_size(logits_KHW[first : first + some], size).max(0)
        class_HW = torch.where(value_HW > best_HW, place_HW + first, class_HW)
        best_HW = torch.maximum(value_HW, best_HW)
    return class_HW


def counts(pred_HW: Tensor, mask_HW: Tensor, classes: int) -> Tensor:
    """Labelled pixels by class (3, K): right ones, by prediction, by mask."""
    known_HW = mask_HW != IGNORED
    pred_P, class_P = pred_HW[known_HW], mask_HW[known_HW].long()
    rows = (class_P[pred_P == class_P], pred_P, class_P)
    return torch.stack([row.bincount(minlength=classes) for row in rows])


def measures(count_3K: Tensor) -> tuple[float, float]:
    """Mean intersection over union of the classes that occur, and pixel accuracy, in %."""
    right_K, pred_K, class_K = count_3K.double()
    union_K = pred_K + class_K - right_K
    return float(100 * (right_K / union_K).nanmean()), float(100 * right_K.sum() / class_K.sum())
