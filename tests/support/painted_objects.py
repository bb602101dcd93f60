"""Painted rectangles for detection; `painted_objects.py FILE` writes each rank's scores to FILE.

Its models have a collective in their forward, as sharded teachers have.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from memory_samples import MemorySamples, patch_model
from memory_sets import scores_of
from torch import Tensor

from unic_ds import dist
from unic_ds.config import Eval
from unic_ds.evaluate.detection import Detection
from unic_ds.evaluate.detector_training import Recipe
from unic_ds.evaluate.feature_pyramid import Heads
from unic_ds.evaluate.features import Annotation, Model, ModelOutput, Outputs
from unic_ds.evaluate.samples import BoxedImage, ImagePair

SIDE, PATCH = 64, 8
COLOURS = ((230, 30, 30), (30, 30, 230))
HEADS = Heads(channels=16, hidden=64, regions=16, proposals=32)
SMALL = Detection(Recipe(heads=HEADS, batch=4, rate=3e-3))


def painted(number: int) -> BoxedImage:
    """A grey image of 56 x 64 px with a rectangle in each half, of a class by its colour."""
    draw = torch.Generator().manual_seed(number)
    image_3HW = torch.randint(60, 80, (3, SIDE, SIDE - 8), generator=draw, dtype=torch.uint8)
    class_M = torch.randint(2, (2,), generator=draw)
    box_M4, mask_MHW = torch.zeros(2, 4), torch.zeros(2, SIDE, SIDE - 8, dtype=torch.bool)
    for half in range(2):
        width, height = torch.randint(16, 28, (2,), generator=draw).tolist()
        x = int(torch.randint(SIDE - 8 - width, (1,), generator=draw))
        y = int(torch.randint(SIDE // 2 - height + 1, (1,), generator=draw)) + half * SIDE // 2
        mask_MHW[half, y : y + height, x : x + width] = True
        image_3HW[:, mask_MHW[half]] = torch.tensor(COLOURS[int(class_M[half])], dtype=torch.uint8)[
            :, None
        ]
        box_M4[half] = torch.tensor([x, y, x + width, y + height])
    return BoxedImage(image_3HW, box_M4, class_M, torch.zeros(2, dtype=torch.bool), mask_MHW)


def sets(train: int, val: int, *, masks: bool = False) -> dict[str, MemorySamples]:
    """Training and validation images."""
    kinds: frozenset[Annotation] = frozenset({"boxes", "masks"} if masks else {"boxes"})
    return {
        name: MemorySamples([painted(first + at) for at in range(count)], kinds, ("red", "blue"))
        for name, first, count in (("train", 0, train), ("val", 1000, val))
    }


def colours(mean_BN3: Tensor) -> Tensor:
    """Mean colours and their products."""
    pairs_BN9 = (mean_BN3[..., None] * mean_BN3[..., None, :]).flatten(2)
    return 4 * torch.cat([mean_BN3, pairs_BN9], 2)


def seeing(name: str = "colours") -> Model:
    """A model whose features tell the objects."""
    return patch_model(name, SIDE, PATCH, colours)


def sharded(model: Model) -> Model:
    """The model, which fails unless all ranks encode together and equally often."""
    calls: list[int] = []

    def encode(image_B3SS: Tensor, needs: frozenset[ModelOutput]) -> Outputs:
        calls.append(len(calls))
        own = f"{model.name} {len(calls)}"
        assert dist.all_gather_objects(own) == [own] * dist.world()
        return model.encode(image_B3SS, needs)

    return replace(model, encode=encode)


def pairs() -> MemorySamples:
    """Pairs of an image and itself, of which the ranks have 3 and 1."""
    found: list[ImagePair | None] = []
    for number in range(5):
        sample = painted(number)
        point_K2 = sample.box_M4[:, :2] + 4
        images = sample.image_3HW, sample.image_3HW
        found.append(ImagePair(*images, point_K2, point_K2, sample.box_M4[0], "rectangle"))
    return MemorySamples([*found[:3], None, found[4]], frozenset({"keypoints"}))


if __name__ == "__main__":
    from unic_ds.evaluate import registry

    dist.start()
    registry.EVALUATORS["small"] = replace(SMALL, recipe=replace(SMALL.recipe, batch=3))
    images = sets(32, 5, masks=True)
    for place in (7, 8, 9):
        images["train"].samples[place] = None  # type: ignore[index]
    images["val"].samples[3 if dist.rank() else 4] = None  # type: ignore[index]
    images["val"].samples[4] = None  # type: ignore[index]
    models = [sharded(seeing()), sharded(seeing("again"))]
    options = Eval(head_images=48, batch=1)
    scores = scores_of("small", models, images, options)
    scores += scores_of("correspondence", models, {"val": pairs()}, options)
    every = dist.all_gather_objects([list(score) for score in scores])
    if dist.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(every))
