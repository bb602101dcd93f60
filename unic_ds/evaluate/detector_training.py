"""Training of detectors on frozen encoders: batches, gradients of all ranks, schedule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW
from torchvision.models.detection import FasterRCNN
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from unic_ds import dist, rng
from unic_ds.evaluate import feature_pyramid
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.feature_pyramid import CELL, Heads
from unic_ds.evaluate.features import Model
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.readable import in_rounds, prepared
from unic_ds.evaluate.samples import BoxedImage, SampleSet
from unic_ds.evaluate.squares import Square, encode_maps, padded_square, square_maps
from unic_ds.process import console

DECAY = 0.1
"""AdamW's weight decay of matrices (arXiv 2203.16527, appendix A.2)."""
WARM_UP = 250
"""Steps of the linear warm-up, but at most a tenth of all."""
DROPS = (8 / 9, 26 / 27)
"""Parts of the training after each of which the rate is divided by 10: of 100 epochs 89 and 96."""
FEW_STEPS = 1000
REMEDY = "lower --eval.batch"


class Shown(NamedTuple):
    """A sample, and its image as squares by their side."""

    sample: BoxedImage
    squares: Mapping[int, Square]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and schedule of the training; the defaults are those of the task."""

    heads: Heads = Heads()  # noqa: RUF009 (frozen)
    batch: int = 16
    """Images of a step on all ranks together."""
    rate: float = 1e-4
    """AdamW's learning rate (arXiv 2203.16527, appendix A.2)."""
    masks: bool = False
    """Masks are learned too."""


@dataclass(frozen=True)
class Trainee:
    """A frozen encoder with the detector that is trained on it."""

    model: Model
    detector: FasterRCNN
    optimiser: AdamW

    def gradient(self, images: Sequence[Shown], device: torch.device, *, seed: int) -> Tensor:
        """The gradient of the summed losses of this rank's images, and their number last.

        `seed` is that of the regions which torchvision samples: the same for all models.
        """
        torch.manual_seed(seed)
        self.optimiser.zero_grad()
        map_BCGG = self.maps(images, device)
        if images:
            loss = self.loss(map_BCGG, images)
            if not loss.isfinite():
                raise ValueError(f"the detector on {self.model.name!r} has diverged; leave it out")
            (loss * len(images)).backward()
        parts = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad
            for weight in self.detector.parameters()
        ]
        return torch.cat([*(part.flatten() for part in parts), parts[0].new_tensor([len(images)])])

    def maps(self, images: Sequence[Shown], device: torch.device) -> Tensor:
        """Patch maps (B, C, G, G) of images, as `square_maps`."""
        return square_maps(self.model, [shown.squares[self.model.size] for shown in images], device)

    def loss(self, map_BCGG: Tensor, images: Sequence[Shown]) -> Tensor:
        """Mean loss of a batch and its patch maps."""
        frame = CELL * map_BCGG.shape[-1]
        masks = self.detector.roi_heads.has_mask()
        targets = [
            target(shown.sample, shown.squares[self.model.size], frame, masks=masks)
            for shown in images
        ]
        device = map_BCGG.device
        targets = [{key: value.to(device) for key, value in row.items()} for row in targets]
        # Inference tensors, as most encoders give, cannot be kept for gradients.
        return feature_pyramid.losses(self.detector, map_BCGG.clone(), targets)

    def update(self, summed: Tensor, rate: float) -> int:
        """One step by the gradients of all ranks' images; the number of these."""
        images = int(summed[-1])
        if not images:
            return 0
        weights = list(self.detector.parameters())
        parts = (summed[:-1] / images).split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = part.view_as(weight)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        return images


def new_trainee(model: Model, classes: int, recipe: Recipe, data: EvalData) -> Trainee:
    """A detector with seeded weights, the same on every rank; ValueError for a map of one patch."""
    blank_13SS = torch.zeros(1, 3, model.size, model.size, dtype=torch.uint8)
    map_1CGG = encode_maps(model, blank_13SS, data.device)
    if map_1CGG.shape[-1] < 2:
        raise ValueError(
            f"{model.name!r} has one patch token at {model.size} px; detection needs a larger side"
        )
    torch.manual_seed(rng.seed_for(data.seed, "detection heads"))
    detector = feature_pyramid.detector(
        map_1CGG.shape[1], classes, recipe.heads, masks=recipe.masks
    ).to(data.device)
    weights = list(detector.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": DECAY},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return Trainee(model, detector, AdamW(groups))


def train(
    trainees: Sequence[Trainee],
    samples: SampleSet[BoxedImage],
    data: EvalData,
    *,
    recipe: Recipe,
    shown: int,
    failures: set[str],
) -> int:
    """Train all detectors on about `shown` images by AdamW; the number that were shown to each.

    Every rank calls it. ValueError if no image can be read. It draws from torch's global random
    state, for torchvision's samplers: the caller restores that.
    """
    steps = max(1, round(shown / recipe.batch))
    if steps < FEW_STEPS:
        console.say(f"detection: {steps} steps train little; --eval.head_images sets the images")
    rows = -(-recipe.batch // dist.world())
    numbers = numbers_of(steps, recipe.batch, rows=rows)
    sides = {trainee.model.size for trainee in trainees}
    shuffled = shown_images(samples, numbers, data.seed, sides=sides, failures=failures)
    groups = in_rounds(shuffled, rows, rounds=steps, task="detection", remedy=REMEDY)
    total = 0
    for step, images in enumerate(console.track(groups, steps, "training detectors")):
        seed = rng.seed_for(data.seed, f"detection {step} {dist.rank()}")
        flats = []
        for trainee in trainees:
            with raised_on_all_ranks("detection", REMEDY):
                flats.append(trainee.gradient(images, data.device, seed=seed))
        summed = [dist.all_reduce_sum(flat) for flat in flats]
        with raised_on_all_ranks("detection", REMEDY):
            for trainee, flat in zip(trainees, summed, strict=True):
                used = trainee.update(flat, recipe.rate * factor_at(step, steps))
            total += used
    if not total:
        raise ValueError(f"no training image of {samples.name!r} can be read; see the log")
    return total


def numbers_of(steps: int, batch: int, *, rows: int) -> list[int | None]:
    """Numbers in the training of this rank's `rows` images of each step, dealt in turn.

    None fills the rows of the ranks that have fewer, so that a step has `batch` images in all.
    """
    own = range(dist.rank(), rows * dist.world(), dist.world())
    return [step * batch + row if row < batch else None for step in range(steps) for row in own]


def factor_at(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then constant with two drops."""
    warm_up = min(WARM_UP, steps // 10)
    drops = sum(step >= round(part * steps) for part in DROPS)
    return min(1.0, (step + 1) / (warm_up + 1)) * 0.1**drops


def shown_images(
    samples: SampleSet[BoxedImage],
    numbers: Sequence[int | None],
    seed: int,
    *,
    sides: Collection[int],
    failures: set[str],
) -> Iterator[Shown | None]:
    """The images with these numbers in the training, flipped at random.

    None for a broken one, and for None.
    """

    def prepare(at: int, sample: BoxedImage) -> Shown:
        number = numbers[at]
        assert number is not None
        flips = rng.uniform(seed, "detection flip", 1, number)[0] < 0.5
        return at_sides(flipped(sample) if flips else sample, sides)

    places = places_of(numbers, len(samples), seed)
    return prepared(samples, places, prepare, failures=failures)


def places_of(shown: Iterable[int | None], count: int, seed: int) -> Iterator[int | None]:
    """Places of the images with these numbers, ascending, in a training in shuffled epochs.

    None for None.
    """
    epoch, order_N = -1, np.arange(count)
    for number in shown:
        if number is None:
            yield None
            continue
        if number // count != epoch:
            epoch = number // count
            bits_N = rng.random_bits(seed, "detection order", 1, epoch, np.arange(count))[:, 0]
            order_N = np.argsort(bits_N, kind="stable")
        yield int(order_N[number % count])


def flipped(sample: BoxedImage) -> BoxedImage:
    """The image and its instances, mirrored left to right."""
    width = sample.image_3HW.shape[2]
    x0_M, y0_M, x1_M, y1_M = sample.box_M4.unbind(1)
    return sample._replace(
        image_3HW=sample.image_3HW.flip(2),
        box_M4=torch.stack([width - x1_M, y0_M, width - x0_M, y1_M], 1),
        mask_MHW=None if sample.mask_MHW is None else sample.mask_MHW.flip(2),
    )


def at_sides(sample: BoxedImage, sides: Collection[int]) -> Shown:
    """The sample with its image as squares of each side."""
    return Shown(sample, {side: padded_square(sample.image_3HW, side) for side in sides})


def target(sample: BoxedImage, square: Square, frame: int, *, masks: bool) -> dict[str, Tensor]:
    """torchvision's target of an image without its crowds, in a frame of `frame` pixels."""
    kept_M = ~sample.crowd_M
    zoom = frame / square.image_3SS.shape[-1]
    box_M4 = sample.box_M4[kept_M] * (square.scale_2 * zoom).repeat(2)
    found = {"boxes": box_M4, "labels": sample.class_M[kept_M] + 1}
    if not masks:
        return found
    assert sample.mask_MHW is not None
    columns, rows = (max(1, round(length * zoom)) for length in square.size_2.tolist())
    mask_MFF = torch.zeros(len(box_M4), frame, frame, dtype=torch.uint8)
    if len(box_M4):
        mask_MFF[:, :rows, :columns] = V.resize(
            sample.mask_MHW[kept_M].to(torch.uint8),
            [rows, columns],
            interpolation=InterpolationMode.NEAREST_EXACT,
        )
    return found | {"masks": mask_MFF}
