"""Triton kernels of `moments`, each with the types of its arguments; `op.py` has the maths."""

from __future__ import annotations

import triton
import triton.language as tl

PART_MEAN, PART_M2, NUM_PART_ROWS = (tl.constexpr(i) for i in range(3))
"""Rows of a part's statistics; its count follows from its number."""
COUNT, MEAN, M2 = (tl.constexpr(i) for i in range(3))
"""Rows of the result."""


@triton.jit(do_not_specialize=["rows", "inner"])
def part_moments_kernel(
    x, part, rows, inner, width, stride_outer, stride_inner, span,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write mean and M2, from the first row, of `span` rows of a block of channels."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < width
    origin = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    row0 = tl.program_id(1) * span
    stop = tl.minimum(row0 + span, rows)
    for start in range(row0, stop, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        mask = (row < stop)[:, None] & inside[None, :]
        outer_offset = (row // inner).to(tl.int64) * stride_outer
        offset = outer_offset + (row % inner).to(tl.int64) * stride_inner
        y = tl.load(x + offset[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.where(mask, y - origin[None, :], 0.0)
        tile_count = tl.minimum(stop - start, BLOCK_M).to(tl.float32)
        tile_mean = tl.sum(y, 0) / tile_count
        rest = tl.where(mask, y - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        total = count + tile_count
        mean += delta * (tile_count / total)
        m2 += tl.sum(rest * rest, 0) + delta * delta * (count * tile_count / total)
        count = total
    out = part + tl.program_id(1).to(tl.int64) * NUM_PART_ROWS * width + channel
    tl.store(out + PART_MEAN * width, mean, mask=inside)
    tl.store(out + PART_M2 * width, m2, mask=inside)


PART_MOMENTS_TYPES = {
    "*{dtype}:16": "x",
    "*fp32:16": "part",
    "i32": "rows inner",
    "i32:16": "width stride_outer stride_inner span",
}


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_moments_kernel(x, part, out, rows, width, span, parts, BLOCK_C: tl.constexpr):
    """Write the statistics of all rows from those of the parts, in their order."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < width
    count = tl.zeros((BLOCK_C,), tl.float64)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for i in range(parts):
        ptr = part + i * NUM_PART_ROWS * width + channel
        part_mean = tl.load(ptr + PART_MEAN * width, mask=inside, other=0.0).to(tl.float64)
        delta = part_mean - mean
        part_count = tl.minimum(rows - i * span, span).to(tl.float64)
        total = count + part_count
        mean += delta * (part_count / total)
        m2 += tl.load(ptr + PART_M2 * width, mask=inside, other=0.0).to(tl.float64)
        m2 += delta * delta * (count * part_count / total)
        count = total
    origin = tl.load(x + channel, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + COUNT * width + channel, count, mask=inside)
    tl.store(out + MEAN * width + channel, mean + origin, mask=inside)
    tl.store(out + M2 * width + channel, m2, mask=inside)


MERGE_MOMENTS_TYPES = {
    "*{dtype}:16": "x",
    "*fp32:16": "part",
    "*fp64:16": "out",
    "i32": "rows parts",
    "i32:16": "width span",
}
