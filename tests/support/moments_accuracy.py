"""Errors of the moments against fp64, beside those of eager torch."""

from __future__ import annotations

import torch

from unic_kernels.moments import moments, moments_ref


def near_the_truth(case, dtype, device="cpu"):
    """At most twice as far from the truth as eager torch; relative to its size."""
    x = case.make(dtype, device)
    truth_SC, eager_SC, found_SC = moments_ref(x.double()), moments_ref(x), moments(x)
    assert found_SC.dtype == torch.float64 and torch.equal(found_SC[0], truth_SC[0])
    for found_C, eager_C, truth_C in zip(found_SC[1:], eager_SC[1:], truth_SC[1:], strict=True):
        scale = truth_C.abs().max().clamp(min=1)
        apart, allowed = ((y - truth_C).abs().max() / scale for y in (found_C, eager_C))
        assert apart <= 2 * allowed + 1e-6
