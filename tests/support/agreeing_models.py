"""Teachers and students in memory whose tokens are computed from small images.

`agreeing_models.py FILE` writes what each rank measures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from memory_sets import MemoryImages, scores_of
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.config import Eval
from unic_ds.evaluate.features import EvalBatch, Model, ModelOutput, Outputs
from unic_ds.tokens import Tokens

SIDE, WIDTH = 8, 6
NAMES = ("teacher", "resolutions")


def tokens_of(image_B3HW: Tensor, width: int = WIDTH) -> Tokens:
    """A smooth function of patches of 4 px: (B, C) and (B, N, C)."""
    patch_B48N = F.unfold(image_B3HW.float() / 255 - 0.5, 4, stride=4)
    draw = torch.Generator().manual_seed(width)
    weight_C48 = torch.randn(width, 48, generator=draw)
    patch_BNC = (weight_C48 @ patch_B48N).transpose(1, 2).tanh() + 0.3
    return Tokens(patch_BNC.mean(1), patch_BNC)


@dataclass(frozen=True)
class Named(Model):
    """A model whose own tokens a test may ask for."""

    def tokens_of(self, images: MemoryImages) -> Tokens:
        """Tokens of all images of a set."""
        return tokens_of(images.value_NC)


def teacher(name: str, model: str = "") -> Named:
    """A teacher of 6 channels on a grid of 2 x 2; `model`: another name of its model."""

    def encode(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        tokens = tokens_of(image_B3HW)
        return Outputs(*tokens, projection={name: tokens})

    outputs: frozenset[ModelOutput] = frozenset({"cls", "patch", "projection"})
    return Named(model or name, SIDE, outputs, encode, "teacher")


def predicting(
    name: str,
    of: str,
    *,
    change: Callable[[Tokens], Tokens] = lambda tokens: tokens,
    side: int = SIDE,
    freed: list[int] | None = None,
) -> Model:
    """A student that predicts the tokens of teacher `of`, changed; `freed` gets freed sides."""

    def encode(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        assert image_B3HW.shape[2] == side
        tokens = tokens_of(image_B3HW)
        return Outputs(*tokens, projection={of: change(tokens)})

    return Model(
        name,
        side,
        frozenset({"cls", "patch", "projection"}),
        encode,
        "student",
        at=lambda other: predicting(f"{name} again", of, change=change, side=other, freed=freed),
        patch=4,
        frees=lambda: (freed if freed is not None else []).append(side),
    )


@dataclass
class ResizedImages(MemoryImages):
    """Images in memory that are shown at each side asked for."""

    def batches(self, sizes: Sequence[int], only: np.ndarray | None = None) -> Iterator[EvalBatch]:
        """This rank's images, nearest neighbours."""
        for batch in super().batches([SIDE], only):
            image_B3HW = batch.images[SIDE].float()
            images = {side: F.interpolate(image_B3HW, (side, side)).byte() for side in sizes}
            yield batch._replace(images=images)


def tokens_set(count: int, seed: int, batch: int = 7) -> ResizedImages:
    """Random images of 8 px of two classes, the second brighter."""
    draw = torch.Generator().manual_seed(seed)
    value_N3HW = torch.randint(0, 200, (count, 3, SIDE, SIDE), generator=draw)
    label_N = torch.arange(count) % 2
    value_N3HW += 20 * label_N[:, None, None, None]
    return ResizedImages(value_N3HW.byte(), label_N, batch=batch)


def measured() -> dict[str, float]:
    """Scores of a teacher and a student, of images that the ranks cannot deal evenly."""
    student = predicting("student", "a", change=lambda t: Tokens(*(0.9 * x + 0.02 for x in t)))
    sets = {"train": tokens_set(31, seed=8), "val": tokens_set(25, seed=9)}
    models, options = [teacher("a"), student], Eval(k=(3,), sizes=(8, 12))
    scores = [s for name in NAMES for s in scores_of(name, models, sets, options)]
    return {f"{score.model} {score.name}": score.value for score in scores}


if __name__ == "__main__":
    dist.start()
    every = dist.all_gather_objects(measured())
    if dist.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(every))
