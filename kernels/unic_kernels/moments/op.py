"""Count, mean and M2 (the sum of squared deviations) of every channel, for running statistics.

    mean = sum_i x_i / n        M2 = sum_i (x_i - mean)^2

Two parts with delta = mean_b - mean_a have together (Chan et al., "Updating formulae and a pairwise
algorithm for computing sample variances", 1979)

    mean = mean_a + delta n_b / n       M2 = M2_a + M2_b + delta^2 n_a n_b / n

A program merges tiles of rows in fp32, a second launch merges the programs' parts in fp64. All
measure from the first row: x - x_0 is exact or nearly so where the mean is large against the
spread, and there a mean in fp32 would lose what tells the parts apart.

Shapes: M rows, C channels, P parts, S = 3 statistics. Rows may be [B, N] with a stride of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unic_kernels.device import Build, beside, dense, pick

# The torch reference


def moments_ref(x_MC: Tensor) -> Tensor:
    """What `moments` means, in the plainest torch and in the precision of `x_MC`."""
    x_MC = x_MC.flatten(0, -2)
    x_MC = x_MC if x_MC.dtype == torch.float64 else x_MC.float()
    mean_C = x_MC.mean(0)
    count_C = torch.full_like(mean_C, len(x_MC))
    return torch.stack([count_C, mean_C, (x_MC - mean_C).square().sum(0)]).double()


# Triton kernels


@triton.jit(do_not_specialize=["rows", "inner"])
def part_moments(
    x, part, rows, inner, width, outer_stride, inner_stride, span,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and M2, from the first row, of `span` rows of a block of channels."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    origin = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    count = 0.0
    mean = tl.zeros((BLOCK,), tl.float32)
    m2 = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        at = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
        y = tl.load(x + at[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.where(mask, y - origin[None, :], 0.0)
        fresh = tl.minimum(last - start, ROWS).to(tl.float32)
        tile_mean = tl.sum(y, 0) / fresh
        rest = tl.where(mask, y - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        total = count + fresh
        mean += delta * (fresh / total)
        m2 += tl.sum(rest * rest, 0) + delta * delta * (count * fresh / total)
        count = total
    out = part + tl.program_id(1).to(tl.int64) * 2 * width + channel
    tl.store(out, mean, mask=inside)
    tl.store(out + width, m2, mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_moments(x, part, out, rows, width, span, parts, BLOCK: tl.constexpr):
    """The statistics of all rows from those of the parts, in their order."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    count = tl.zeros((BLOCK,), tl.float64)
    mean = tl.zeros((BLOCK,), tl.float64)
    m2 = tl.zeros((BLOCK,), tl.float64)
    for i in range(parts):
        at = part + i * 2 * width + channel
        delta = tl.load(at, mask=inside, other=0.0).to(tl.float64) - mean
        fresh = tl.minimum(rows - i * span, span).to(tl.float64)
        total = count + fresh
        mean += delta * (fresh / total)
        m2 += tl.load(at + width, mask=inside, other=0.0).to(tl.float64)
        m2 += delta * delta * (count * fresh / total)
        count = total
    origin = tl.load(x + channel, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + channel, count, mask=inside)
    tl.store(out + width + channel, mean + origin, mask=inside)
    tl.store(out + 2 * width + channel, m2, mask=inside)


class Config(NamedTuple):
    """Rows and channels of a tile, and how many parts the rows are split into at most."""

    rows: int
    block: int
    parts: int
    warps: int


CONFIGS = {80: Config(32, 128, 64, 4), 90: Config(32, 128, 64, 4), 100: Config(32, 128, 64, 4)}
MERGE = 128
"""Channels of a program that merges."""


def moments_triton(x: Tensor) -> Tensor:
    """Two launches; how rows are split depends on their number alone."""
    x_ONC = dense(x if x.dim() == 3 else x[None])
    outer, inner, width = x_ONC.shape
    rows = outer * inner
    if not rows:
        return x.new_zeros(3, width, dtype=torch.float64)
    config = pick(CONFIGS, x.device)
    span = config.rows * triton.cdiv(rows, config.rows * config.parts)
    parts = triton.cdiv(rows, span)
    part_P2C = x.new_empty(parts, 2, width, dtype=torch.float32)
    found_SC = x.new_empty(3, width, dtype=torch.float64)
    with beside(x):
        part_moments[(triton.cdiv(width, config.block), parts)](
            x_ONC,
            part_P2C,
            rows,
            inner,
            width,
            x_ONC.stride(0),
            x_ONC.stride(1),
            span,
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.warps,
        )
        merge_moments[(triton.cdiv(width, MERGE),)](
            x_ONC, part_P2C, found_SC, rows, width, span, parts, BLOCK=MERGE, num_warps=4
        )
    return found_SC


def builds(arch: int) -> Iterator[Build]:
    """Every variant that ships for an architecture: features in bf16 or fp32."""
    config = CONFIGS[arch]
    plain = ("rows", "inner", "width", "outer_stride", "inner_stride", "span")
    for dtype in ("bf16", "fp32"):
        types = {"x": f"*{dtype}", "part": "*fp32"} | dict.fromkeys(plain, "i32")
        constants = {"ROWS": config.rows, "BLOCK": config.block}
        options = {"num_warps": config.warps}
        aligned = frozenset(plain) - {"inner", "rows"}
        name = f"part_moments {dtype}"
        yield Build(name, part_moments, types, constants, options, aligned)
        types = {"x": f"*{dtype}", "part": "*fp32", "out": "*fp64"}
        types |= dict.fromkeys(("rows", "width", "span", "parts"), "i32")
        aligned = frozenset({"width", "span"})
        name = f"merge_moments {dtype}"
        yield Build(name, merge_moments, types, {"BLOCK": MERGE}, {"num_warps": 4}, aligned)


# The op


@torch.library.custom_op("unic_kernels::moments", mutates_args=(), device_types="cpu")
def _moments(x: Tensor) -> Tensor:
    """Two passes in fp32 from the first row; the second finds what rounding took from the mean."""
    x_MC = x.flatten(0, -2)
    if not len(x_MC):
        return x.new_zeros(3, x.shape[-1], dtype=torch.float64)
    x_MC = x_MC if x.dtype == torch.float64 else x_MC.float()
    rest_MC = x_MC - x_MC[0]
    mean_C = rest_MC.mean(0)
    rest_MC -= mean_C
    lost_C = rest_MC.mean(0).double()
    m2_C = rest_MC.square().sum(0).double() - len(x_MC) * lost_C.square()
    mean_C = x_MC[0].double() + mean_C.double() + lost_C
    return torch.stack([torch.full_like(mean_C, len(x_MC)), mean_C, m2_C.clamp(min=0)])


_moments.register_kernel("cuda")(moments_triton)


@_moments.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(3, x.shape[-1], dtype=torch.float64)


# The public function


def moments(x: Tensor) -> Tensor:
    """Count, mean and M2 of each channel over all rows of [M, C] or [B, N, C]: fp64 [3, C].

    No gradient. Of no rows all three are 0.
    """
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"moments wants floats [M, C] or [B, N, C], got {x.dtype} {[*x.shape]}")
    return _moments(x.detach())


# Cases that tests and benchmarks share


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows by their sizes; `offset` is the means' size against spreads of about 1."""

    shape: tuple[int, ...]
    offset: float = 1.0
    strided: bool = False  # x[:, 1:] of a longer sequence

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{sizes} {self.offset:g}{' strided' if self.strided else ''}"

    def make(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Random rows whose channels differ in mean and spread."""
        g = torch.Generator().manual_seed(sum(self.shape))
        *rows, width = self.shape
        rows[-1] += self.strided
        scale_C = torch.rand(width, generator=g) + 0.5
        x = torch.randn(*rows, width, generator=g) * scale_C + self.offset * scale_C.flip(0)
        x = x.to(device, dtype)
        return x[:, 1:] if self.strided else x


CASES = (
    Case(shape=(1, 96)),
    Case(shape=(127, 200)),
    Case(shape=(257, 130), offset=1e3),
    Case(shape=(2500, 16), offset=1e4),
    Case(shape=(3, 19, 200), strided=True),
    Case(shape=(2, 300, 40), strided=True, offset=100.0),
    Case(shape=(0, 24)),
)
