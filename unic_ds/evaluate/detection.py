"""Detection: heads are trained on the last patch map of a frozen encoder, and scored as COCO's.

Another protocol than ViTDet's (arXiv 2203.16527), whose encoders are fine-tuned at 1024 px. All
models are trained in one pass over the images, each rank on its part of every batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import clip_boxes_to_image

from unic_ds import dist
from unic_ds.evaluate import feature_pyramid
from unic_ds.evaluate.average_precision import (
    Found,
    Kind,
    Truth,
    average_precision,
    compressed,
    library,
)
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.detector_training import (
    DECAY,
    REMEDY,
    Recipe,
    Shown,
    Trainee,
    at_sides,
    new_trainee,
    train,
)
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.feature_pyramid import CELL
from unic_ds.evaluate.features import Annotation, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.readable import in_rounds, prepared, rounds_of, say_left_out
from unic_ds.evaluate.samples import BoxedImage, SampleSet, share
from unic_ds.evaluate.squares import Square, at_side

SIDE, PATCHES = 512, 4
"""Side of the images, and a divisor of their patches in a row: maps of half the side are whole."""
EPOCHS = 12
TESTED = 8
"""Images whose regions are classified at once: 400 MB a layer."""
DEFAULT = Recipe()
PASTED = 2**24
"""Pixels of masks that are pasted at once: 64 MB."""


@dataclass(frozen=True)
class Detection:
    """COCO's box AP, AP50 and, if both sets have masks, mask AP of trained heads."""

    recipe: Recipe = DEFAULT
    model_needs: frozenset[ModelOutput] = frozenset({"patch"})
    data_needs: frozenset[Annotation] = frozenset({"boxes"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield the scores of each model.

        RuntimeError without the library that scores; ValueError if no image can be read.
        """
        library()
        classes = len(data.samples("train").classes)
        recipe = replace(
            self.recipe,
            masks="masks" in data.annotations(),
            heads=self.recipe.heads.for_images(data.options.size or SIDE),
            batch=min(self.recipe.batch, images_to_show(data)),
        )
        kinds: list[Kind] = ["bbox", "segm"] if recipe.masks else ["bbox"]
        sized, shown, truth, found = train_and_test(models, data, recipe)
        for at, model in enumerate(sized):
            used = f"{shown} images shown, {len(truth)} tested, {model.size} px padded, flips"
            how = f"AdamW {recipe.rate:g} wd {DECAY:g}, batch {recipe.batch}"
            how += f", {recipe.heads.regions} of {recipe.heads.proposals} regions"
            for kind in kinds:
                scored = partial(average_precision, truth, found[at], classes=classes, kind=kind)
                ap, ap50 = dist.on_rank_0(scored)
                net = "Mask" if recipe.masks else "Faster"
                rule = f"frozen encoder, simple pyramid, {net} R-CNN, {how}, {used}"
                if kind == "segm":
                    yield Score(model.name, "detection mask AP", ap, f"detection {rule}, AP 50:95")
                    continue
                yield Score(model.name, "detection box AP", ap, f"detection {rule}, AP 50:95")
                yield Score(model.name, "detection box AP50", ap50, f"detection {rule}, AP 50")


def images_to_show(data: EvalData) -> int:
    """Images of the training, each as often as it is shown."""
    return data.options.head_images or EPOCHS * len(data.samples("train"))


def train_and_test(
    models: Sequence[Model], data: EvalData, recipe: Recipe
) -> tuple[list[Model], int, list[Truth], list[list[Found]]]:
    """Models at their side, images shown, instances, and each model's detections.

    The random state of torch, from which torchvision draws, is as before at the end.
    """
    train_set, val_set = data.samples("train"), data.samples("val")
    failures: set[str] = set()
    gpus = [data.device] if data.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(gpus))
        with raised_on_all_ranks("detection", REMEDY):
            side = data.options.size or SIDE
            sized = [stack.enter_context(at_side(model, side, patches=PATCHES)) for model in models]
            trainees = [new_trainee(m, len(train_set.classes), recipe, data) for m in sized]
        shown = images_to_show(data)
        shown = train(trainees, train_set, data, recipe=recipe, shown=shown, failures=failures)
        truth, found = detect_all(trainees, val_set, data, failures)
    say_left_out("detection", failures)
    parts = dist.all_gather_objects((truth, found))
    truth = [image for part, _ in parts for image in part]
    if not truth:
        raise ValueError(f"no validation image of {val_set.name!r} can be read; see the log")
    found = [[one for _, part in parts for one in part[at]] for at in range(len(sized))]
    return sized, shown, truth, found


@torch.no_grad()
def detect_all(
    trainees: Sequence[Trainee],
    samples: SampleSet[BoxedImage],
    data: EvalData,
    failures: set[str],
) -> tuple[list[Truth], list[list[Found]]]:
    """Instances of this rank's images, and each model's detections; every rank calls it."""
    truth: list[Truth] = []
    found: list[list[Found]] = [[] for _ in trainees]
    masks = trainees[0].detector.roi_heads.has_mask()
    sides = {trainee.model.size for trainee in trainees}
    size = min(TESTED, data.options.batch)
    rounds = rounds_of(len(samples), size)
    shown = prepared(
        samples,
        share(range(len(samples))),
        lambda _, sample: at_sides(sample, sides),
        failures=failures,
    )
    for batch in in_rounds(shown, size, rounds=rounds, task="detection", remedy=REMEDY):
        for trainee, rows in zip(trainees, found, strict=True):
            with raised_on_all_ranks("detection", REMEDY):
                rows += detections(trainee, batch, data.device)
        with raised_on_all_ranks("detection", REMEDY):
            truth += [truth_of(image.sample, masks=masks) for image in batch]
    return truth, found


def truth_of(sample: BoxedImage, *, masks: bool) -> Truth:
    """The instances of an image."""
    height, width = sample.image_3HW.shape[1:]
    rles = None
    if masks:
        assert sample.mask_MHW is not None
        rles = compressed(sample.mask_MHW)
    return Truth(
        height,
        width,
        sample.box_M4.numpy(),
        sample.class_M.numpy(),
        sample.crowd_M.numpy(),
        rles,
    )


def detections(trainee: Trainee, images: Sequence[Shown], device: torch.device) -> list[Found]:
    """A model's detections in images, at their own size."""
    side = trainee.model.size
    map_BCGG = trainee.maps(images, device)
    if not images:
        return []
    zoom = CELL * map_BCGG.shape[-1] / side
    rows = feature_pyramid.detect(trainee.detector, map_BCGG)
    return [
        detections_of_image(row, image.sample, image.squares[side], zoom)
        for row, image in zip(rows, images, strict=True)
    ]


def detections_of_image(
    row: dict[str, Tensor], sample: BoxedImage, square: Square, zoom: float
) -> Found:
    """Detections of a frame in pixels of the image; those in the padding are left out."""
    height, width = sample.image_3HW.shape[1:]
    box_D4 = row["boxes"] / (square.scale_2 * zoom).repeat(2).to(row["boxes"].device)
    box_D4 = clip_boxes_to_image(box_D4, (height, width))
    inside_D = (box_D4[:, 2:] > box_D4[:, :2]).all(1)
    box_D4 = box_D4[inside_D]
    rles = None
    if "masks" in row:
        rles = pasted(row["masks"][inside_D], box_D4, (height, width))
    return Found(
        box_D4.cpu().numpy(),
        (row["labels"][inside_D] - 1).cpu().numpy(),
        row["scores"][inside_D].cpu().numpy(),
        rles,
    )


def pasted(mask_D1PP: Tensor, box_D4: Tensor, size: tuple[int, int]) -> tuple[bytes, ...]:
    """Masks of boxes as run lengths in an image of (height, width) pixels."""
    rows = max(1, PASTED // (size[0] * size[1]))
    found: list[bytes] = []
    for mask_d1PP, box_d4 in zip(mask_D1PP.split(rows), box_D4.split(rows), strict=True):
        mask_d1HW = paste_masks_in_image(mask_d1PP, box_d4, size)
        found += compressed((mask_d1HW[:, 0] >= 0.5).cpu())
    return tuple(found)
