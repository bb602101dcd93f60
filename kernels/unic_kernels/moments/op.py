"""Count, mean and M2 (the sum of squared deviations) of every channel, for running statistics.

    mean = sum_i x_i / n        M2 = sum_i (x_i - mean)^2

Two parts with delta = mean_b - mean_a have together (Chan et al., "Updating formulae and a pairwise
algorithm for computing sample variances", 1979)

    mean = mean_a + delta n_b / n       M2 = M2_a + M2_b + delta^2 n_a n_b / n

A program merges tiles of rows in fp32, a second launch merges the programs' parts in fp64. All
measure from the first row: x - x_0 is exact or nearly so if the mean is large against the
spread, in which case a mean in fp32 would lose the differences between parts.

Shapes: M rows, C channels, P parts, S = 3 statistics. Rows may be [B, N] with a stride of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unic_kernels import custom_op
from unic_kernels.moments import cpu, launch
from unic_kernels.moments.arguments import Arguments


def moments(x: Tensor, /) -> Tensor:
    """Return count, mean and M2 of each channel over all rows of [M, C] or [B, N, C]: fp64 [3, C].

    No gradient. Of no rows all three are 0. ValueError unless `x` is of floats and has two or three
    axes.
    """
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"moments wants floats [M, C] or [B, N, C], got {x.dtype} {[*x.shape]}")
    found_SC: Tensor = FORWARD(*Arguments(x.detach()))
    return found_SC


def fake(given: Arguments) -> Tensor:
    """Return an empty tensor of the shape that the op returns."""
    return given.x.new_empty(3, given.x.shape[-1], dtype=torch.float64)


FORWARD = custom_op.define(
    "moments", Arguments, "Tensor", cpu=cpu.moments, cuda=launch.moments, fake=fake
)
