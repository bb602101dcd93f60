"""Models at the side that a task wants, and images of any shape as squares for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from unic_ds.evaluate.features import Model

PADDING = (124, 116, 104)
"""ImageNet's mean colour, which the preprocessing of most encoders maps to about 0."""


@contextmanager
def at_side(model: Model, side: int, *, patches: int = 1) -> Iterator[Model]:
    """Context manager of the model at the side nearest to `side`, freed at its end.

    The patches of a row are a multiple of `patches`. A model that has one side stays as it is.
    """
    step = max(model.patch, 1) * patches
    nearest = max(1, round(side / step)) * step
    if model.at is None or not model.patch or nearest == model.size:
        yield model
        return
    resized = model.at(nearest)
    try:
        yield resized
    finally:
        if resized.frees:
            resized.frees()


def to_maps(patch_BNC: Tensor) -> Tensor:
    """Patch tokens as fp32 maps (B, C, G, G); ValueError if they do not form a square."""
    side = round(patch_BNC.shape[1] ** 0.5)
    if side * side != patch_BNC.shape[1]:
        raise ValueError(f"{patch_BNC.shape[1]} patch tokens do not form a square grid")
    return patch_BNC.float().transpose(1, 2).unflatten(2, (side, side))


def encode_maps(model: Model, image_B3SS: Tensor, device: torch.device) -> Tensor:
    """A model's patch tokens of uint8 squares, as `to_maps`, without a graph.

    ValueError if they are not finite.
    """
    with torch.no_grad():
        patch_BNC = model.encode(image_B3SS.to(device), frozenset({"patch"})).patch_BNC
    assert patch_BNC is not None, f"{model.name} has no patch tokens"
    if not patch_BNC.isfinite().all():
        raise ValueError(f"patch tokens of {model.name!r} are NaN or infinite; leave it out")
    return to_maps(patch_BNC)


class Square(NamedTuple):
    """An image in the top left corner of a square."""

    image_3SS: Tensor
    """uint8; the rest of the square is `PADDING`."""
    size_2: Tensor
    """fp32 width and height of the image within the square, in pixels."""
    scale_2: Tensor
    """fp32 pixels of the square per pixel of the image, along x and y."""


def square_maps(model: Model, squares: Sequence[Square], device: torch.device) -> Tensor:
    """A model's patch maps (B, C, G, G) of squares of its side; errors as `encode_maps`.

    Without squares one that is blank is encoded, and none returned: a model may have collectives.
    """
    blank_3SS = torch.zeros(3, model.size, model.size, dtype=torch.uint8)
    image_B3SS = torch.stack([square.image_3SS for square in squares] or [blank_3SS])
    return encode_maps(model, image_B3SS, device)[: len(squares)]


def padded(image_3HW: Tensor, side: int, *, centred: bool = False) -> Tensor:
    """An image, or a batch of them, padded to at least `side` px each way by `PADDING`.

    At the right and the bottom alone unless `centred`.
    """
    height, width = image_3HW.shape[-2:]
    below, right = max(side - height, 0), max(side - width, 0)
    if not below and not right:
        return image_3HW
    colour_311 = image_3HW.new_tensor(PADDING).view(3, 1, 1)
    shape = (*image_3HW.shape[:-2], height + below, width + right)
    padded_3HW = colour_311.expand(shape).clone()
    top, left = (below // 2, right // 2) if centred else (0, 0)
    padded_3HW[..., top : top + height, left : left + width] = image_3HW
    return padded_3HW


def padded_square(image_3HW: Tensor, side: int) -> Square:
    """Resize a uint8 image so that its longer side is `side`, and pad right and below."""
    height, width = image_3HW.shape[1:]
    longer = max(height, width)
    rows, columns = (max(1, round(length * side / longer)) for length in (height, width))
    small_3HW = V.resize(
        image_3HW, [rows, columns], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    square_3SS = padded(small_3HW, side)
    size_2 = torch.tensor([columns, rows], dtype=torch.float32)
    return Square(square_3SS, size_2, size_2 / torch.tensor([width, height]))
