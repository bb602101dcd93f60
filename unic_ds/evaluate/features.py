"""Features of an image set: one row per image, computed by this rank for its own share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(Protocol):
    """What is read of a batch: the images at each size asked for, and which samples they are."""

    @property
    def images(self) -> dict[int, Tensor]: ...

    @property
    def index_B(self) -> Any: ...


@torch.inference_mode()
def extract(encode: Callable[[dict[int, Tensor]], Tensor], batches: Iterable[Batch]) -> Tensor:
    """fp32 features (N, C) on the CPU, rows in the order of the batches.

    `encode` takes a batch's images (side in pixels -> uint8 B3HW) and gives its features (B, C).
    This rank's share only: `rounds.Side` gathers them. ValueError if there are no batches, or if
    `encode` gives another number of rows than images.
    """
    rows = []
    for batch in batches:
        feature_BC = encode(batch.images).float().cpu()
        if len(feature_BC) != len(batch.index_B):
            raise ValueError(f"encode gave {len(feature_BC)} rows for {len(batch.index_B)} images")
        rows.append(feature_BC)
    if not rows:
        raise ValueError("there are no images to take features of; give data.val or data.val_share")
    return torch.cat(rows)


def pixels(image_B3HW: Tensor, size: int = 16) -> Tensor:
    """The baseline without a model: grey thumbnails scaled to [-1, 1], (B, size * size) fp32."""
    grey_B1HW = image_B3HW.float().mean(1, keepdim=True)
    small_B1HW = F.interpolate(grey_B1HW, (size, size), mode="bilinear", antialias=True)
    return small_B1HW.flatten(1) / 127.5 - 1
