"""`moments` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from unic_kernels.dtype import upcast


def moments_ref(x: Tensor, /) -> Tensor:
    """Compute what `moments` does, in fp32, or in fp64 if `x` is."""
    x_MC = upcast(x.flatten(0, -2))
    mean_C = x_MC.mean(0)
    count_C = torch.full_like(mean_C, len(x_MC))
    return torch.stack([count_C, mean_C, (x_MC - mean_C).square().sum(0)]).double()
