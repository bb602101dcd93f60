"""Launches of the ladder's kernels: tiles by architecture, grids, arguments, builds to check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unic_kernels.builds import Build, build
from unic_kernels.device import config_for, contiguous_rows, on_device_of
from unic_kernels.ladder.arguments import BackwardArguments, ForwardArguments, Gradients, Results
from unic_kernels.ladder.kernels import (
    FIND_KEPT_TYPES,
    FIRST_LINEAR_TYPES,
    HIDDEN_GRAD_TYPES,
    INPUT_GRAD_TYPES,
    WEIGHT_GRAD_TYPES,
    find_kept_kernel,
    first_linear_kernel,
    hidden_grad_kernel,
    input_grad_kernel,
    weight_grad_kernel,
)
from unic_kernels.ladder.layout import Layout, TileEntry


class Config(NamedTuple):
    """A GEMM's tile: rows and columns of the result, depth of a step, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return blocks | {"GROUP_M": 8}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


FEW_ROWS = 64
"""Up to so many rows, smaller tiles are taken: CLS tokens."""


class Configs(NamedTuple):
    """Tiles of an architecture: for 16-bit types, the same for few rows, for `hidden_grad_kernel`,
    whose epilogue reads one tile more, and for fp32.
    """

    half: Config
    few_rows: Config
    hidden_grad: Config
    fp32: Config

    def of(
        self, dtype: torch.dtype, *, few_rows: bool = False, hidden_grad: bool = False
    ) -> Config:
        if dtype == torch.float32:
            return self.fp32
        return self.hidden_grad if hidden_grad else self.few_rows if few_rows else self.half


_HIDDEN_GRAD = Config(128, 64, 64, 8, 3)
_HOPPER = Configs(
    half=Config(128, 128, 64, 8, 3),
    few_rows=Config(64, 128, 64, 4, 3),
    hidden_grad=_HIDDEN_GRAD,
    fp32=Config(64, 64, 32, 4, 2),
)
_AMPERE = Configs(
    half=Config(128, 128, 32, 8, 3),
    few_rows=Config(64, 128, 64, 8, 3),
    hidden_grad=_HIDDEN_GRAD,
    fp32=Config(64, 64, 16, 4, 2),
)
CONFIGS = {80: _AMPERE, 90: _HOPPER, 100: _HOPPER}
FIND_KEPT_BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 256}


def forward(given: ForwardArguments) -> Results:
    """Return predictions per teacher, z and h. L + T launches."""
    x, layout, rows = given.x, given.layout, given.shape.numel()
    empty = x[0].new_empty(0)
    h = x[0].new_empty(rows * layout.total)
    z = empty if given.recompute == "all" else torch.empty_like(h)
    first_linear(given, z, h, None)
    y = []
    for teacher, (weight_CK, bias_C) in enumerate(zip(given.w2, given.b2, strict=True)):
        h_MK = layout.matrix_of(h, teacher, rows)
        y.append(torch.addmm(bias_C, h_MK, weight_CK.T).unflatten(0, given.shape))
    return y, z, h if given.recompute == "none" else empty.clone()


class Kept(NamedTuple):
    """Images kept, per teacher: flags, indices with those of kept images in front, their number."""

    flag_TB: Tensor
    order_TB: Tensor
    count_T: Tensor


def first_linear(
    given: ForwardArguments | BackwardArguments, z: Tensor, h: Tensor, kept: Kept | None
) -> None:
    """Write h, and z unless it is empty, of all images or of those kept."""
    layout = given.layout
    images, tokens, width = given.x[0].shape
    rows = images * tokens
    if not rows:
        return
    config = config_for(CONFIGS, h.device).of(h.dtype, few_rows=rows <= FEW_ROWS)
    row_tiles = triton.cdiv(rows, config.block_m)
    for rung, x_BND in enumerate(map(contiguous_rows, given.x)):
        table = rung_table(layout, rung, config.block_n, h.device)
        with on_device_of(h):
            first_linear_kernel[(row_tiles * len(table),)](
                x_BND,
                given.w1[rung].contiguous(),
                given.b1[rung].contiguous(),
                z,
                h,
                table,
                kept.order_TB if kept else table,
                kept.count_T if kept else table,
                rows,
                tokens,
                images,
                width,
                x_BND.stride(0),
                x_BND.stride(1),
                row_tiles,
                len(table),
                KEPT_ONLY=kept is not None,
                STORE_Z=z.numel() > 0,
                ALIGN=layout.align,
                EVEN_K=width % config.block_k == 0,
                **config.constants(),
                **config.options(),
            )


def backward(given: BackwardArguments) -> Gradients:
    """Return the gradients over kept (teacher, image) pairs."""
    x, layout, z, h = given.x, given.layout, given.z, given.h
    dy = [dy_BNC.contiguous() for dy_BNC in given.dy]  # autograd may expand one number over it
    kept, db2 = find_kept(dy)
    if given.recompute == "hidden":  # of all images: a pass over memory, no GEMM
        h = torch.ops.aten.gelu(z)
    if given.recompute == "all":
        h = x[0].new_empty(given.shape.numel() * layout.total)
        z = torch.empty_like(h)
        first_linear(given, z, h, kept)
    dz, db1_K = hidden_grad(dy, given.w2, z, layout, kept)
    dx = input_grad(x, given.w1, dz, layout, kept) if given.need_x else []
    dw1, dw2 = [], []
    block_m = config_for(CONFIGS, x[0].device).of(x[0].dtype).block_m
    for rung, x_BND in enumerate(map(contiguous_rows, x)):
        table = rung_table(layout, rung, block_m, dz.device)
        dw1.append(torch.empty_like(given.w1[rung], memory_format=torch.contiguous_format))
        weight_grad(dz, x_BND, dw1[-1], table, kept, layout.align)
    for teacher, dy_BNC in enumerate(dy):
        width = dy_BNC.shape[2]
        table = output_table(teacher, width, block_m, dz.device)
        h_BNK = layout.matrix_of(h, teacher, given.shape.numel()).unflatten(0, given.shape)
        dw2.append(torch.empty_like(given.w2[teacher], memory_format=torch.contiguous_format))
        weight_grad(dy_BNC, h_BNK, dw2[-1], table, kept, math.gcd(16, width))
    db1 = [torch.cat([db1_K[part] for part in layout.columns(rung)]) for rung in range(len(x))]
    return Gradients(dx, dw1, db1, dw2, db2)


def find_kept(dy: Sequence[Tensor]) -> tuple[Kept, list[Tensor]]:
    """Return the images with any gradient, and db2, in one pass over `dy`."""
    images, tokens, _ = dy[0].shape
    flag_TB = dy[0].new_zeros(len(dy), images, dtype=torch.int32)
    db2 = []
    for teacher, dy_BNC in enumerate(dy):
        width = dy_BNC.shape[2]
        part_BC = dy_BNC.new_empty(images, width, dtype=torch.float32)
        if images:
            with on_device_of(dy_BNC):
                find_kept_kernel[(images, triton.cdiv(width, FIND_KEPT_BLOCKS["BLOCK_N"]))](
                    dy_BNC,
                    flag_TB[teacher],
                    part_BC,
                    tokens,
                    width,
                    **FIND_KEPT_BLOCKS,
                    num_warps=4,
                )
        db2.append(part_BC.sum(0).to(dy_BNC.dtype))
    order_TB = flag_TB.argsort(dim=1, descending=True, stable=True).int()
    return Kept(flag_TB, order_TB, flag_TB.sum(1, dtype=torch.int32)), db2


def hidden_grad(
    dy: Sequence[Tensor], w2: Sequence[Tensor], z: Tensor, layout: Layout, kept: Kept
) -> tuple[Tensor, Tensor]:
    """Return dz of the kept images (the rest is not written) and its sum over all rows."""
    images, tokens, _ = dy[0].shape
    rows = images * tokens
    config = config_for(CONFIGS, z.device).of(z.dtype, hidden_grad=True)
    row_tiles = triton.cdiv(rows, config.block_m)
    dz = torch.empty_like(z)
    part_K = z.new_zeros(row_tiles, layout.total, dtype=torch.float32)
    for teacher, dy_BNC in enumerate(dy):
        width, ld_k = dy_BNC.shape[2], layout.width_T[teacher]
        column_tiles = triton.cdiv(ld_k, config.block_n)
        if not rows:
            break
        with on_device_of(z):
            hidden_grad_kernel[(row_tiles * column_tiles,)](
                dy_BNC,
                w2[teacher].contiguous(),
                z,
                dz,
                part_K,
                kept.order_TB[teacher],
                kept.count_T[teacher:],
                rows,
                tokens,
                width,
                layout.column0_T[teacher],
                ld_k,
                layout.total,
                row_tiles,
                column_tiles,
                ALIGN=math.gcd(16, ld_k),
                EVEN_K=width % config.block_k == 0,
                **config.constants(),
                **config.options(),
            )
    return dz, part_K.sum(0).to(z.dtype)


def input_grad(
    x: Sequence[Tensor], w1: Sequence[Tensor], dz: Tensor, layout: Layout, kept: Kept
) -> list[Tensor]:
    """Return dx of every rung, dense; L launches."""
    images, tokens, width = x[0].shape
    rows = images * tokens
    configs = config_for(CONFIGS, dz.device)
    # A tile that meets several images computes a teacher for all if one keeps it.
    meets_several = tokens % configs.of(dz.dtype).block_m > 0
    config = configs.of(dz.dtype, few_rows=rows <= FEW_ROWS or meets_several)
    row_tiles, column_tiles = triton.cdiv(rows, config.block_m), triton.cdiv(width, config.block_n)
    dx = [x_BND.new_empty(x_BND.shape) for x_BND in x]
    for rung, weight_HD in enumerate(w1):
        table = rung_table(layout, rung, None, dz.device)
        if not rows:
            break
        with on_device_of(dz):
            input_grad_kernel[(row_tiles * column_tiles,)](
                dz,
                weight_HD.contiguous(),
                dx[rung],
                table,
                kept.flag_TB,
                rows,
                tokens,
                images,
                width,
                len(table),
                row_tiles,
                column_tiles,
                ALIGN=math.gcd(layout.align, width),
                EVEN_K=all(block.width % config.block_k == 0 for block in layout.rungs[rung]),
                **config.constants(),
                **config.options(),
            )
    return dx


def weight_grad(
    left: Tensor, right_BND: Tensor, out: Tensor, table: Tensor, kept: Kept, align: int
) -> None:
    """Write left^T right over kept rows; `table` maps columns of `left` to rows of `out`.

    `align` divides every width in the table.
    """
    images, tokens, width = right_BND.shape
    config = config_for(CONFIGS, out.device).of(out.dtype)
    column_tiles = triton.cdiv(width, config.block_n)
    with on_device_of(out):
        weight_grad_kernel[(len(table) * column_tiles,)](
            left,
            right_BND,
            out,
            table,
            kept.order_TB,
            kept.count_T,
            images * tokens,
            tokens,
            images,
            width,
            right_BND.stride(0),
            right_BND.stride(1),
            len(table),
            column_tiles,
            ALIGN=math.gcd(align, width),
            **config.constants(),
            **config.options(),
        )


@lru_cache(maxsize=4096)
def rung_table(layout: Layout, rung: int, tile: int | None, device: torch.device) -> Tensor:
    """Return a rung's hidden units by tile, or by block if `tile` is None: int32 [tiles, 6].

    Cached, so that it is sent to the device once.
    """
    entries = [
        TileEntry(
            block.teacher,
            row0=block.row0 + start,
            column=block.column + start,
            num_columns=min(step, block.width - start),
            column0=layout.column0_T[block.teacher],
            ld_k=layout.width_T[block.teacher],
        )
        for block in layout.rungs[rung]
        for step in (tile or block.width,)
        for start in range(0, block.width, step)
    ]
    return torch.tensor(entries, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def output_table(teacher: int, width: int, tile: int, device: torch.device) -> Tensor:
    """Return a teacher's output channels by tile, which have a matrix of their own."""
    entries = [
        TileEntry(teacher, start, start, min(tile, width - start), column0=0, ld_k=width)
        for start in range(0, width, tile)
    ]
    return torch.tensor(entries, dtype=torch.int32, device=device)


def builds(arch: int) -> Iterator[Build]:
    """Yield every variant that ships for an architecture: bf16 in its tiles, and fp32."""
    configs = CONFIGS[arch]
    for name, kernel, types, constants in variants():
        tiles = {"bf16": configs.half, "bf16 few rows": configs.few_rows, "fp32": configs.fp32}
        if kernel is hidden_grad_kernel:
            tiles = {"bf16": configs.hidden_grad, "fp32": configs.fp32}
        if kernel is weight_grad_kernel:
            del tiles["bf16 few rows"]
        for size, config in tiles.items():
            known, options = config.constants() | constants, config.options()
            dtype = size.split()[0]
            yield build(f"{name} {size}", kernel, types, known, options, dtype=dtype)
    for dtype in ("bf16", "fp32"):
        options = {"num_warps": 4}
        name, kernel = f"find_kept {dtype}", find_kept_kernel
        yield build(name, kernel, FIND_KEPT_TYPES, FIND_KEPT_BLOCKS, options, dtype=dtype)


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Yield name, kernel, types and constants of all that is launched, for aligned widths."""
    even: dict[str, Any] = {"ALIGN": 16, "EVEN_K": True}
    for name, constants in (
        ("first_linear z", {"KEPT_ONLY": False, "STORE_Z": True}),
        ("first_linear h alone", {"KEPT_ONLY": False, "STORE_Z": False}),
        ("first_linear kept", {"KEPT_ONLY": True, "STORE_Z": True}),
    ):
        yield name, first_linear_kernel, FIRST_LINEAR_TYPES, even | constants
    yield "hidden_grad", hidden_grad_kernel, HIDDEN_GRAD_TYPES, even
    yield "input_grad", input_grad_kernel, INPUT_GRAD_TYPES, even
    yield "weight_grad", weight_grad_kernel, WEIGHT_GRAD_TYPES, {"ALIGN": 16}
