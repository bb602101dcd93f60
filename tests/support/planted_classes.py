"""Features with planted classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    train_NC: Tensor
    train_label_N: Tensor
    val_NC: Tensor
    val_label_N: Tensor


def planted(train: int, val: int, width: int, classes: int, gap: float, seed: int = 0) -> Rows:
    """Gaussian classes, centres `gap` standard deviations long, in channels of different scale."""
    g = torch.Generator().manual_seed(seed)
    label_N = torch.randint(classes, (train + val,), generator=g)
    centre = torch.randn(classes, width, generator=g) * gap / width**0.5
    x_NC = centre[label_N] + torch.randn(train + val, width, generator=g)
    x_NC = x_NC * torch.logspace(0, -3, width)
    return Rows(x_NC[:train], label_N[:train], x_NC[train:], label_N[train:])
