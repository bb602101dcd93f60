"""Triton kernels of the ladder, each with the types of its arguments.

A backward program works on the rows of one teacher's kept images, packed: row r of teacher t is
token r mod N of image kept_order[t, r div N], with the kept images in front of `kept_order` and
their number in `kept_count`. So skipping wastes less than one tile per teacher, whatever N is, CLS
tokens (N = 1) included, and the host never reads a flag. Only dx adds teachers up: its tiles are
plain rows, and a teacher is skipped if it keeps no image of the tile; tiles of 128 rows meet one
image at N = 256, tiles of 64 rows meet at most two at N = 196.

Column tiles come from a table with a `layout.TileEntry` per tile or block of hidden units. The
second Linears are plain GEMMs: cuBLAS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unic_kernels.gelu import gelu, gelu_derivative
from unic_kernels.ladder.layout import TileEntry

NUM_FIELDS = tl.constexpr(len(TileEntry._fields))
TEACHER = tl.constexpr(TileEntry._fields.index("teacher"))
ROW0 = tl.constexpr(TileEntry._fields.index("row0"))
COLUMN = tl.constexpr(TileEntry._fields.index("column"))
NUM_COLUMNS = tl.constexpr(TileEntry._fields.index("num_columns"))
COLUMN0 = tl.constexpr(TileEntry._fields.index("column0"))
LD_K = tl.constexpr(TileEntry._fields.index("ld_k"))


@triton.jit
def tile_of_program(row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Row and column tile of this program; neighbours share rows and columns in the L2 cache."""
    program = tl.program_id(0)
    row_tile0 = program // (GROUP_M * column_tiles) * GROUP_M
    size = tl.minimum(row_tiles - row_tile0, GROUP_M)
    in_group = program % (GROUP_M * column_tiles)
    return row_tile0 + in_group % size, in_group // size


@triton.jit
def load_tile_entry(table, i, ALIGN: tl.constexpr):
    """The fields of `TileEntry` number i, in their order; widths are multiples of ALIGN."""
    entry = table + i * NUM_FIELDS
    row0 = tl.multiple_of(tl.load(entry + ROW0).to(tl.int64), ALIGN)
    column = tl.multiple_of(tl.load(entry + COLUMN).to(tl.int64), ALIGN)
    column0 = tl.multiple_of(tl.load(entry + COLUMN0).to(tl.int64), ALIGN)
    ld_k = tl.multiple_of(tl.load(entry + LD_K).to(tl.int64), ALIGN)
    teacher = tl.load(entry + TEACHER)
    num_columns = tl.multiple_of(tl.load(entry + NUM_COLUMNS), ALIGN)
    return teacher, row0, column, num_columns, column0, ld_k


@triton.jit
def clamp_columns(j, width, ALIGN: tl.constexpr):
    """Columns j below `width`, which ALIGN divides, else 0, for which a store is masked.

    Neighbours in groups of ALIGN are inside or outside together. `tl.where` hides that from the
    compiler, which would then load element by element and not by asynchronous copies; a group that
    is outside reads the first ALIGN columns.
    """
    return tl.max_contiguous(tl.multiple_of(tl.where(j < width, j, 0), ALIGN), ALIGN)


@triton.jit
def kept_rows(kept_order, r, num_kept_rows, tokens):
    """Image and token of packed rows, and if they exist; a row that does not is token 0."""
    inside = r < num_kept_rows
    image = tl.load(kept_order + r // tokens, mask=inside, other=0).to(tl.int64)
    return image, tl.where(inside, r % tokens, 0).to(tl.int64), inside


@triton.jit(do_not_specialize=["rows", "tokens", "images"])
def first_linear_kernel(
    x, weight, bias, z, h, table, kept_order, kept_count, rows, tokens, images, width,
    stride_xb, stride_xn, row_tiles, column_tiles,
    KEPT_ONLY: tl.constexpr, STORE_Z: tl.constexpr, ALIGN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write z = x W1^T + b1 and h = gelu(z) of one rung into the teachers' matrices."""
    row_tile, column_tile = tile_of_program(row_tiles, column_tiles, GROUP_M)
    teacher, row0, column, num_columns, column0, ld_k = load_tile_entry(table, column_tile, ALIGN)
    r = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if KEPT_ONLY:
        num_kept_rows = tl.load(kept_count + teacher) * tokens
        if row_tile * BLOCK_M >= num_kept_rows:
            return
        image, token, inside = kept_rows(kept_order + teacher * images, r, num_kept_rows, tokens)
    else:
        inside = r < rows
        image = tl.where(inside, r // tokens, 0).to(tl.int64)
        token = tl.where(inside, r % tokens, 0).to(tl.int64)
    j = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptr = x + (image * stride_xb + token * stride_xn)[:, None] + k[None, :]
    w_ptr = weight + (row0 + tl.where(j < num_columns, j, 0))[None, :] * width + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_ptr)
            b = tl.load(w_ptr)
        else:
            a = tl.load(x_ptr, mask=k[None, :] < width - start, other=0.0)
            b = tl.load(w_ptr, mask=k[:, None] < width - start, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    total += tl.load(bias + row0 + j, mask=j < num_columns, other=0.0).to(tl.float32)[None, :]
    total = total.to(h.dtype.element_ty)  # forward, recomputation and backward see the same z
    mask = inside[:, None] & (j < num_columns)[None, :]
    offset = column0 * rows + (image * tokens + token)[:, None] * ld_k + column + j[None, :]
    if STORE_Z:
        tl.store(z + offset, total, mask=mask)
    tl.store(h + offset, gelu(total.to(tl.float32)).to(h.dtype.element_ty), mask=mask)


FIRST_LINEAR_TYPES = {
    "*{dtype}:16": "x weight bias z h",
    "*i32:16": "table kept_order kept_count",
    "i32:16": "width stride_xb stride_xn",
    "i32": "rows tokens images row_tiles column_tiles",
}


@triton.jit(do_not_specialize=["tokens"])
def find_kept_kernel(
    dy, kept_flag, part, tokens, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Set kept_flag[image] if dy has anything but zeros; sum over an image's tokens for db2."""
    image = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    found = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, tokens, BLOCK_M):
        n = start + tl.arange(0, BLOCK_M)
        mask = (n < tokens)[:, None] & (j < width)[None, :]
        offset = (image * tokens + n)[:, None] * width + j[None, :]
        value = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value, 0)
        found = tl.maximum(found, (value != 0.0).to(tl.int32))
    tl.store(part + image * width + j, total, mask=j < width)
    # Programs of one image may all write here, but all write the same.
    tl.store(kept_flag + image, 1, mask=tl.max(tl.max(found, 1), 0) > 0)


FIND_KEPT_TYPES = {
    "*{dtype}:16": "dy",
    "*i32:16": "kept_flag",
    "*fp32:16": "part",
    "i32:16": "width",
    "i32": "tokens",
}


@triton.jit(do_not_specialize=["rows", "tokens"])
def hidden_grad_kernel(
    dy, weight, z, dz, part, kept_order, kept_count, rows, tokens, width, column0, ld_k,
    total_width, row_tiles, column_tiles,
    ALIGN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write dz = (dy W2) gelu'(z) of one teacher's kept images, and its sums over a tile's rows."""
    row_tile, column_tile = tile_of_program(row_tiles, column_tiles, GROUP_M)
    num_kept_rows = tl.load(kept_count) * tokens
    if row_tile * BLOCK_M >= num_kept_rows:
        return
    r = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image, token, inside = kept_rows(kept_order, r, num_kept_rows, tokens)
    row = image * tokens + token
    j = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    dy_ptr = dy + row[:, None] * width + k[None, :]
    w_ptr = weight + k[:, None].to(tl.int64) * ld_k + clamp_columns(j, ld_k, ALIGN)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            a = tl.load(dy_ptr)
            b = tl.load(w_ptr)
        else:
            a = tl.load(dy_ptr, mask=k[None, :] < width - start, other=0.0)
            b = tl.load(w_ptr, mask=k[:, None] < width - start, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        dy_ptr += BLOCK_K
        w_ptr += BLOCK_K * ld_k
    mask = inside[:, None] & (j < ld_k)[None, :]
    offset = column0 * rows.to(tl.int64) + row[:, None] * ld_k + j[None, :]
    pre_activation = tl.load(z + offset, mask=mask, other=0.0).to(tl.float32)
    total = tl.where(mask, total * gelu_derivative(pre_activation), 0.0)
    tl.store(dz + offset, total.to(dz.dtype.element_ty), mask=mask)
    part += row_tile.to(tl.int64) * total_width + column0
    tl.store(part + j, tl.sum(total, 0), mask=j < ld_k)


HIDDEN_GRAD_TYPES = {
    "*{dtype}:16": "dy weight z dz",
    "*fp32:16": "part",
    "*i32:16": "kept_order kept_count",
    "i32:16": "width column0 ld_k total_width",
    "i32": "rows tokens row_tiles column_tiles",
}


@triton.jit(do_not_specialize=["rows", "tokens", "images", "blocks"])
def input_grad_kernel(
    dz, weight, dx, table, kept_flag, rows, tokens, images, width, blocks,
    row_tiles, column_tiles,
    ALIGN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write dx = sum over kept teachers of dz W1, of one rung."""
    row_tile, column_tile = tile_of_program(row_tiles, column_tiles, GROUP_M)
    r = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tl.where(r < rows, r // tokens, 0)
    row = tl.where(r < rows, r, 0).to(tl.int64)
    j = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = clamp_columns(j, width, ALIGN)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(blocks):
        teacher, row0, column, num_columns, column0, ld_k = load_tile_entry(table, i, ALIGN)
        kept = tl.load(kept_flag + teacher * images + image, mask=r < rows, other=0)
        if tl.max(kept, 0) > 0:
            dz_ptr = dz + column0 * rows + row[:, None] * ld_k + column + k[None, :]
            w_ptr = weight + (row0 + k)[:, None] * width + d[None, :]
            for start in range(0, num_columns, BLOCK_K):
                if EVEN_K:  # the rows of dropped images were never written
                    a = tl.load(dz_ptr, mask=kept[:, None] > 0, other=0.0)
                    b = tl.load(w_ptr)
                else:
                    inside = k < num_columns - start
                    a = tl.load(dz_ptr, mask=(kept[:, None] > 0) & inside[None, :], other=0.0)
                    b = tl.load(w_ptr, mask=inside[:, None], other=0.0)
                total = tl.dot(a, b, total, input_precision="ieee")
                dz_ptr += BLOCK_K
                w_ptr += BLOCK_K * width
    mask = (r < rows)[:, None] & (j < width)[None, :]
    offset = row[:, None] * width + j[None, :]
    tl.store(dx + offset, total.to(dx.dtype.element_ty), mask=mask)


INPUT_GRAD_TYPES = {
    "*{dtype}:16": "dz weight dx",
    "*i32:16": "table kept_flag",
    "i32:16": "width",
    "i32": "rows tokens images blocks row_tiles column_tiles",
}


@triton.jit(do_not_specialize=["rows", "tokens", "images"])
def weight_grad_kernel(
    left, right, out, table, kept_order, kept_count, rows, tokens, images, width,
    stride_rb, stride_rn, row_tiles, column_tiles,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write left^T right over a teacher's kept rows: dW1 (dz and x) or dW2 (dy and h)."""
    row_tile, column_tile = tile_of_program(row_tiles, column_tiles, GROUP_M)
    teacher, row0, column, num_columns, column0, ld_k = load_tile_entry(table, row_tile, ALIGN)
    num_kept_rows = tl.load(kept_count + teacher) * tokens
    i = tl.arange(0, BLOCK_M)
    j = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    left += column0 * rows + column + clamp_columns(i, num_columns, ALIGN)[None, :]
    right += clamp_columns(j, width, ALIGN)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, num_kept_rows, BLOCK_K):
        r = start + tl.arange(0, BLOCK_K)
        image, token, inside = kept_rows(kept_order + teacher * images, r, num_kept_rows, tokens)
        row = image * tokens + token
        a = tl.load(left + row[:, None] * ld_k, mask=inside[:, None], other=0.0)
        offset = (image * stride_rb + token * stride_rn)[:, None]
        b = tl.load(right + offset, mask=inside[:, None], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    mask = (i < num_columns)[:, None] & (j < width)[None, :]
    offset = (row0 + i)[:, None] * width + j[None, :]
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=mask)


WEIGHT_GRAD_TYPES = {
    "*{dtype}:16": "left right out",
    "*i32:16": "table kept_order kept_count",
    "i32:16": "width stride_rb stride_rn",
    "i32": "rows tokens images row_tiles column_tiles",
}
