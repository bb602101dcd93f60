"""`moments` in torch, for CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from unic_kernels.dtype import upcast
from unic_kernels.moments.arguments import Arguments


def moments(given: Arguments) -> Tensor:
    """Return count, mean and M2 by two passes in fp32, measured from the first row; the second
    finds what rounding took from the mean.
    """
    x_MC = given.x.flatten(0, -2)
    if not len(x_MC):
        return x_MC.new_zeros(3, x_MC.shape[-1], dtype=torch.float64)
    x_MC = upcast(x_MC)
    rest_MC = x_MC - x_MC[0]
    mean_C = rest_MC.mean(0)
    rest_MC -= mean_C
    lost_C = rest_MC.mean(0).double()
    m2_C = rest_MC.square().sum(0).double() - len(x_MC) * lost_C.square()
    mean_C = x_MC[0].double() + mean_C.double() + lost_C
    return torch.stack([torch.full_like(mean_C, len(x_MC)), mean_C, m2_C.clamp(min=0)])
