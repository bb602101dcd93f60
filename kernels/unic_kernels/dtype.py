"""The type in which sums are taken."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return `x` in fp32, or as it is if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()
