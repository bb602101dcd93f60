"""Sets of images with masks or depth in memory, and models whose patch tokens say the answer.

An image is made of rectangles of one colour; a rectangle's class is the place of its largest
channel, and its depth that channel's entry in `METRES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from memory_samples import MemorySamples
from torch import Tensor
from torch.nn import functional as F

from unic_ds.evaluate.features import Model, ModelOutput, Outputs
from unic_ds.evaluate.samples import IGNORED, DepthImage, MaskedImage

METRES = torch.tensor([1.5, 3.0, 6.0])
CLASSES = ("red", "green", "blue")


def class_maps(count: int, height: int, width: int, *, block: int, seed: int = 0) -> list[Tensor]:
    """uint8 classes (H, W), constant in squares of `block` px."""
    rng = np.random.default_rng(seed)
    rows, columns = -(-height // block), -(-width // block)
    grids = rng.integers(0, 3, (count, rows, columns), dtype=np.uint8)
    return [
        torch.from_numpy(np.kron(grid, np.ones((block, block), np.uint8))[:height, :width].copy())
        for grid in grids
    ]


def coloured(class_HW: Tensor) -> Tensor:
    """The image of a map of classes, uint8 3HW."""
    return (40 + 160 * F.one_hot(class_HW.long(), 3)).permute(2, 0, 1).to(torch.uint8)


def mask_set(maps: Sequence[Tensor], *, ignored_rows: int = 0) -> MemorySamples:
    """Images whose masks are the maps; the first rows of a mask are not labelled."""
    samples = []
    for class_HW in maps:
        mask_HW = class_HW.clone()
        mask_HW[:ignored_rows] = IGNORED
        samples.append(MaskedImage(coloured(class_HW), mask_HW))
    return MemorySamples(samples, frozenset({"masks"}), CLASSES)


def depth_set(maps: Sequence[Tensor]) -> MemorySamples:
    """Images whose depths are those of their classes."""
    samples = [DepthImage(coloured(class_HW), METRES[class_HW.long()]) for class_HW in maps]
    return MemorySamples(samples, frozenset({"depth"}))


def token_model(
    name: str, size: int, patch: int, token: Callable[[Tensor], Tensor], *, flexible: bool = False
) -> Model:
    """A model whose patch token is a function of the patch's mean colour (B, 3, H, W)."""

    def encode(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        assert image_B3HW.shape[-2:] == (size, size) and image_B3HW.dtype == torch.uint8
        map_BCHW = token(F.avg_pool2d(image_B3HW.float(), patch))
        return Outputs(map_BCHW.mean((2, 3)) * 0, map_BCHW.flatten(2).transpose(1, 2))

    def at(side: int) -> Model:
        return token_model(name, side, patch, token, flexible=True)

    outputs: frozenset[ModelOutput] = frozenset({"cls", "patch"})
    return Model(name, size, outputs, encode, at=at if flexible else None, patch=patch)


def one_hot(colour_B3HW: Tensor) -> Tensor:
    """The class as a one-hot vector."""
    return F.one_hot(colour_B3HW.argmax(1), 3).permute(0, 3, 1, 2).float()


def constant(colour_B3HW: Tensor) -> Tensor:
    """The same token everywhere."""
    return torch.ones_like(colour_B3HW)
