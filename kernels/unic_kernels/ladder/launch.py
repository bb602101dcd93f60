"""Launches of the ladder's kernels, their configs by architecture, and builds to check ahead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unic_kernels.device import Build, beside, dense, pick
from unic_kernels.ladder.kernels import (
    find_kept,
    first_linear,
    hidden_gradient,
    input_gradient,
    weight_gradient,
)
from unic_kernels.ladder.layout import Layout


class Config(NamedTuple):
    """A GEMM's tile: rows and columns of the result, depth of a step, warps, pipeline stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "INNER": self.inner, "GROUP": 8}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


NARROW = 64
"""Rows that are so few take smaller tiles: CLS tokens."""


class Configs(NamedTuple):
    """Tiles of an architecture: for 16-bit types, the same for few rows, where the epilogue reads
    a tile more, for fp32.
    """

    half: Config
    narrow: Config
    slope: Config
    single: Config

    def of(self, dtype: torch.dtype, *, narrow: bool = False, slope: bool = False) -> Config:
        if dtype == torch.float32:
            return self.single
        return self.slope if slope else self.narrow if narrow else self.half


_SLOPE = Config(128, 64, 64, 8, 3)
_LATE = Configs(
    half=Config(128, 128, 64, 8, 3),
    narrow=Config(64, 128, 64, 4, 3),
    slope=_SLOPE,
    single=Config(64, 64, 32, 4, 2),
)
_AMPERE = Configs(
    half=Config(128, 128, 32, 8, 3),
    narrow=Config(64, 128, 64, 8, 3),
    slope=_SLOPE,
    single=Config(64, 64, 16, 4, 2),
)
CONFIGS = {80: _AMPERE, 90: _LATE, 100: _LATE}
SEEK_ROWS, SEEK_COLUMNS = 16, 256
"""Tile of `find_kept`."""


def forward_triton(
    x: Sequence[Tensor],
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b2: Sequence[Tensor],
    layout: Layout,
    recompute: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Predictions per teacher, z and h; these are empty unless they are kept. L + T launches."""
    shape = x[0].shape[:2]
    nothing = x[0].new_empty(0)
    h = x[0].new_empty(shape.numel() * layout.total)
    z = nothing if recompute == "all" else torch.empty_like(h)
    fill_hidden(x, w1, b1, z, h, layout, None)
    y = []
    for teacher, (weight_CK, bias_C) in enumerate(zip(w2, b2, strict=True)):
        h_MK = layout.of(h, teacher, shape.numel())
        y.append(torch.addmm(bias_C, h_MK, weight_CK.T).unflatten(0, shape))
    return y, z, h if recompute == "none" else nothing.clone()


class Kept(NamedTuple):
    """Which images every teacher keeps: flags, the kept ones' indices in front, their number."""

    flag_TB: Tensor
    order_TB: Tensor
    count_T: Tensor


def fill_hidden(
    x: Sequence[Tensor],
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    z: Tensor,
    h: Tensor,
    layout: Layout,
    kept: Kept | None,
) -> None:
    """Write h, and z unless it is empty, of all images or of those kept."""
    images, tokens, width = x[0].shape
    rows = images * tokens
    config = pick(CONFIGS, h.device).of(h.dtype, narrow=rows <= NARROW)
    row_tiles = triton.cdiv(rows, config.rows)
    for rung, x_BND in enumerate(map(dense, x)):
        table = table_of(layout, rung, config.columns, h.device)
        if not rows:
            return
        with beside(h):
            first_linear[(row_tiles * len(table),)](
                x_BND,
                w1[rung].contiguous(),
                b1[rung].contiguous(),
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
                PACKED=kept is not None,
                KEEP_Z=z.numel() > 0,
                ALIGN=layout.align,
                EVEN=width % config.inner == 0,
                **config.constants(),
                **config.options(),
            )


def backward_triton(
    dy: Sequence[Tensor],
    x: Sequence[Tensor],
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Sequence[Tensor],
    z: Tensor,
    h: Tensor,
    layout: Layout,
    recompute: str,
    need_x: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x (empty unless needed), w1, b1, w2, b2, over kept (teacher, image) pairs."""
    images, tokens, _ = x[0].shape
    kept, db2 = seek(dy)
    if recompute == "hidden":  # of all images: a pass over memory, no GEMM
        h = torch.ops.aten.gelu(z)
    if recompute == "all":
        h = x[0].new_empty(images * tokens * layout.total)
        z = torch.empty_like(h)
        fill_hidden(x, w1, b1, z, h, layout, kept)
    dz, db1_K = hidden_gradients(dy, w2, z, layout, kept)
    dx = input_gradients(x, w1, dz, layout, kept) if need_x else []
    dw1, dw2 = [], []
    tile = pick(CONFIGS, x[0].device).of(x[0].dtype).rows
    for rung, x_BND in enumerate(map(dense, x)):
        table = table_of(layout, rung, tile, dz.device)
        dw1.append(torch.empty_like(w1[rung], memory_format=torch.contiguous_format))
        product(dz, x_BND, dw1[-1], table, kept, layout.align)
    for teacher, dy_BNC in enumerate(dy):
        table = table_of_rows(teacher, dy_BNC.shape[2], tile, dz.device)
        h_BNK = layout.of(h, teacher, images * tokens).unflatten(0, (images, tokens))
        dw2.append(torch.empty_like(w2[teacher], memory_format=torch.contiguous_format))
        product(dy_BNC, h_BNK, dw2[-1], table, kept, math.gcd(16, dy_BNC.shape[2]))
    db1 = [torch.cat([db1_K[at] for at in layout.columns(rung)]) for rung in range(len(x))]
    return dx, dw1, db1, dw2, db2


def seek(dy: Sequence[Tensor]) -> tuple[Kept, list[Tensor]]:
    """The images with any gradient, and db2, in one pass over `dy`."""
    images, tokens, _ = dy[0].shape
    flag_TB = dy[0].new_zeros(len(dy), images, dtype=torch.int32)
    db2 = []
    for teacher, dy_BNC in enumerate(dy):
        width = dy_BNC.shape[2]
        part_BC = dy_BNC.new_empty(images, width, dtype=torch.float32)
        if images:
            with beside(dy_BNC):
                find_kept[(images, triton.cdiv(width, SEEK_COLUMNS))](
                    dy_BNC,
                    flag_TB[teacher],
                    part_BC,
                    tokens,
                    width,
                    ROWS=SEEK_ROWS,
                    COLUMNS=SEEK_COLUMNS,
                    num_warps=4,
                )
        db2.append(part_BC.sum(0).to(dy_BNC.dtype))
    order_TB = flag_TB.argsort(dim=1, descending=True, stable=True).int()
    return Kept(flag_TB, order_TB, flag_TB.sum(1, dtype=torch.int32)), db2


def hidden_gradients(
    dy: Sequence[Tensor],
    w2: Sequence[Tensor],
    z: Tensor,
    layout: Layout,
    kept: Kept,
) -> tuple[Tensor, Tensor]:
    """dz of the kept images (the rest is not written) and its sum over all rows."""
    images, tokens, _ = dy[0].shape
    rows = images * tokens
    config = pick(CONFIGS, z.device).of(z.dtype, slope=True)
    row_tiles = triton.cdiv(rows, config.rows)
    dz = torch.empty_like(z)
    part_K = z.new_zeros(row_tiles, layout.total, dtype=torch.float32)
    for teacher, dy_BNC in enumerate(dy):
        width, own = dy_BNC.shape[2], layout.width_T[teacher]
        column_tiles = triton.cdiv(own, config.columns)
        if not rows:
            break
        with beside(z):
            hidden_gradient[(row_tiles * column_tiles,)](
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
                layout.before_T[teacher],
                own,
                layout.total,
                row_tiles,
                column_tiles,
                ALIGN=math.gcd(16, own),
                EVEN=width % config.inner == 0,
                **config.constants(),
                **config.options(),
            )
    return dz, part_K.sum(0).to(z.dtype)


def input_gradients(
    x: Sequence[Tensor], w1: Sequence[Tensor], dz: Tensor, layout: Layout, kept: Kept
) -> list[Tensor]:
    """dx of every rung, dense; L launches."""
    images, tokens, width = x[0].shape
    rows = images * tokens
    configs = pick(CONFIGS, dz.device)
    config = configs.of(dz.dtype)
    # A tile that meets several images computes a teacher for all where one keeps it.
    narrow = rows <= NARROW or tokens % config.rows > 0
    config = configs.of(dz.dtype, narrow=narrow)
    row_tiles, column_tiles = triton.cdiv(rows, config.rows), triton.cdiv(width, config.columns)
    dx = [x_BND.new_empty(x_BND.shape) for x_BND in x]
    for rung, weight_HD in enumerate(w1):
        table = table_of(layout, rung, None, dz.device)
        if not rows:
            break
        with beside(dz):
            input_gradient[(row_tiles * column_tiles,)](
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
                EVEN=all(block.width % config.inner == 0 for block in layout.rungs[rung]),
                **config.constants(),
                **config.options(),
            )
    return dx


def product(
    left: Tensor, right_BND: Tensor, out: Tensor, table: Tensor, kept: Kept, align: int
) -> None:
    """Write left^T right over kept rows; the table says which columns of `left` are which rows.

    `align` divides every width in the table.
    """
    images, tokens, width = right_BND.shape
    config = pick(CONFIGS, out.device).of(out.dtype)
    column_tiles = triton.cdiv(width, config.columns)
    with beside(out):
        weight_gradient[(len(table) * column_tiles,)](
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
def table_of(layout: Layout, rung: int, tile: int | None, device: torch.device) -> Tensor:
    """A rung's tiles of hidden units, or its blocks; sent to the device once."""
    rows = [
        (block.teacher, block.row + at, block.column + at, min(step, block.width - at), *place)
        for block in layout.rungs[rung]
        for step in (tile or block.width,)
        for at in range(0, block.width, step)
        for place in ((layout.before_T[block.teacher], layout.width_T[block.teacher]),)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def table_of_rows(teacher: int, width: int, tile: int, device: torch.device) -> Tensor:
    """Tiles of a teacher's own channels, which have a matrix of their own."""
    rows = [(teacher, at, at, min(tile, width - at), 0, width) for at in range(0, width, tile)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def builds(arch: int) -> Iterator[Build]:
    """Every variant that ships for an architecture: bf16 in its tiles, and fp32."""
    half, narrow, slope, single = CONFIGS[arch]
    for name, kernel, constants in variants():
        tiles = {"bf16": half, "bf16 narrow": narrow, "fp32": single}
        if kernel is hidden_gradient:
            tiles = {"bf16": slope, "fp32": single}
        if kernel is weight_gradient:
            del tiles["bf16 narrow"]
        for size, config in tiles.items():
            types = types_of(kernel, size.split()[0])
            known = config.constants() | constants
            aligned = frozenset(types) & ALIGNED
            yield Build(f"{name} {size}", kernel, types, known, config.options(), aligned)
    for dtype in ("bf16", "fp32"):
        constants = {"ROWS": SEEK_ROWS, "COLUMNS": SEEK_COLUMNS}
        types = types_of(find_kept, dtype)
        name = f"find_kept {dtype}"
        yield Build(name, find_kept, types, constants, {"num_warps": 4}, frozenset({"width"}))


def variants() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, kernel and constants of everything that the launchers ask for, in aligned widths."""
    even: dict[str, Any] = {"ALIGN": 16, "EVEN": True}
    for keep in (True, False):
        kind = "z" if keep else "h alone"
        yield f"first_linear {kind}", first_linear, even | {"PACKED": False, "KEEP_Z": keep}
    yield "first_linear packed", first_linear, even | {"PACKED": True, "KEEP_Z": True}
    yield "hidden_gradient", hidden_gradient, even
    yield "input_gradient", input_gradient, even
    yield "weight_gradient", weight_gradient, {"ALIGN": 16}


ALIGNED = frozenset(
    {"width", "x_image", "x_token", "before", "own", "total_width", "right_image", "right_token"}
)
POINTERS = frozenset({"x", "weight", "bias", "z", "h", "dy", "dz", "dx", "left", "right", "out"})


def types_of(kernel: Any, dtype: str) -> dict[str, str]:
    """The types of a kernel's arguments, as launched."""
    special = {"table": "*i32", "order": "*i32", "count": "*i32", "keep": "*i32", "part": "*fp32"}
    return {
        name: special.get(name, f"*{dtype}" if name in POINTERS else "i32")
        for name in kernel.arg_names
        if not name.isupper()
    }
