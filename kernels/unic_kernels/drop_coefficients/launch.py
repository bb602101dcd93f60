"""The launch of the kernel of `drop_coefficients`, and builds to check."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from unic_kernels.builds import Build, build
from unic_kernels.device import on_device_of
from unic_kernels.drop_coefficients.arguments import Arguments, expected_pairs
from unic_kernels.drop_coefficients.kernels import (
    DROP_COEFFICIENTS_TYPES,
    drop_coefficients_kernel,
)

BLOCK_B = 128
"""Images of one block."""


def drop_coefficients(given: Arguments) -> Tensor:
    """Return the coefficients [T, B]. One launch."""
    loss_TB, rate = given.loss_TB, given.rate
    weight_TB = torch.empty_like(loss_TB, memory_format=torch.contiguous_format)
    teachers, images = loss_TB.shape
    if not images:
        return weight_TB
    with on_device_of(loss_TB):
        drop_coefficients_kernel[(1,)](
            loss_TB.contiguous(),
            given.uniform_TB.contiguous(),
            given.weight_T.contiguous(),
            weight_TB,
            teachers,
            images,
            rate,
            expected_pairs(loss_TB, rate, given.keep_hardest),
            KEEP_HARDEST=given.keep_hardest,
            PER_STEP=given.per_step,
            COUNT_KEPT=given.count_kept,
            BLOCK_T=triton.next_power_of_2(teachers),
            BLOCK_B=BLOCK_B,
            num_warps=4,
        )
    return weight_TB


def builds(arch: int) -> Iterator[Build]:
    """Yield every variant that ships, the same on all architectures."""
    kernel, types = drop_coefficients_kernel, DROP_COEFFICIENTS_TYPES
    for unit in ("image", "step", "any"):
        for divisor in ("expected", "kept"):
            constants = {
                "KEEP_HARDEST": unit != "any",
                "PER_STEP": unit == "step",
                "COUNT_KEPT": divisor == "kept",
                "BLOCK_T": 4,
                "BLOCK_B": BLOCK_B,
            }
            yield build(f"drop {unit} {divisor}", kernel, types, constants, {"num_warps": 4})
