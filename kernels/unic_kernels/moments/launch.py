"""Launches of the kernels of `moments`: tiles, grids, builds to check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from unic_kernels.builds import Build, build
from unic_kernels.device import config_for, contiguous_rows, on_device_of
from unic_kernels.moments.arguments import Arguments
from unic_kernels.moments.kernels import (
    MERGE_MOMENTS_TYPES,
    PART_MOMENTS_TYPES,
    merge_moments_kernel,
    part_moments_kernel,
)


class Config(NamedTuple):
    """Rows and channels of a tile, and how many parts the rows are split into at most."""

    block_m: int
    block_c: int
    parts: int
    num_warps: int

    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_C": self.block_c}


CONFIGS = {80: Config(32, 128, 64, 4), 90: Config(32, 128, 64, 4), 100: Config(32, 128, 64, 4)}
MERGE_BLOCK_C = 128
"""Channels of a program that merges."""


def moments(given: Arguments) -> Tensor:
    """Return count, mean and M2. Two launches; the number of rows alone decides their split."""
    x = given.x
    x_ONC = contiguous_rows(x if x.dim() == 3 else x[None])
    outer, inner, width = x_ONC.shape
    rows = outer * inner
    if not rows:
        return x.new_zeros(3, width, dtype=torch.float64)
    config = config_for(CONFIGS, x.device)
    span = config.block_m * triton.cdiv(rows, config.block_m * config.parts)
    parts = triton.cdiv(rows, span)
    part_P2C = x.new_empty(parts, 2, width, dtype=torch.float32)
    found_SC = x.new_empty(3, width, dtype=torch.float64)
    with on_device_of(x):
        part_moments_kernel[(triton.cdiv(width, config.block_c), parts)](
            x_ONC,
            part_P2C,
            rows,
            inner,
            width,
            x_ONC.stride(0),
            x_ONC.stride(1),
            span,
            **config.constants(),
            num_warps=config.num_warps,
        )
        merge_moments_kernel[(triton.cdiv(width, MERGE_BLOCK_C),)](
            x_ONC, part_P2C, found_SC, rows, width, span, parts, BLOCK_C=MERGE_BLOCK_C, num_warps=4
        )
    return found_SC


def builds(arch: int) -> Iterator[Build]:
    """Yield every variant that ships for an architecture: features in bf16 or fp32."""
    config = CONFIGS[arch]
    part, merge = config.constants(), {"BLOCK_C": MERGE_BLOCK_C}
    for dtype in ("bf16", "fp32"):
        for name, kernel, types, constants, num_warps in (
            ("part_moments", part_moments_kernel, PART_MOMENTS_TYPES, part, config.num_warps),
            ("merge_moments", merge_moments_kernel, MERGE_MOMENTS_TYPES, merge, 4),
        ):
            options = {"num_warps": num_warps}
            yield build(f"{name} {dtype}", kernel, types, constants, options, dtype=dtype)
