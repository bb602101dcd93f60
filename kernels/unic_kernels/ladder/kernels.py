"""Triton kernels of the ladder.

A backward program works on rows of one teacher's kept images, packed: row r of teacher t is token
r mod N of image order[t, r div N], with the kept images in front of `order` and their number in
`count`. So skipping wastes less than one tile per teacher, whatever N is, CLS tokens (N = 1)
included, and the host never reads a flag. Only dx adds teachers up: its tiles are plain rows, and a
teacher is skipped where it keeps no image of the tile; tiles of 128 rows meet one image at N = 256,
tiles of 64 rows meet at most two at N = 196.

Column tiles come from a table with a row per tile or block of hidden units: teacher, first row in
the stacked weight, first column in the teacher's matrix, columns, columns of the teachers in front,
columns of the teacher's matrix. The second Linears are plain GEMMs: cuBLAS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unic_kernels.gelu import gelu, gelu_slope


@triton.jit
def place(row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile of this program; neighbours share rows and columns in the L2 cache."""
    program = tl.program_id(0)
    first = program // (GROUP * column_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * column_tiles)
    return first + inside % size, inside // size


@triton.jit
def entry(table, i, ALIGN: tl.constexpr):
    """A row of the table; widths are multiples of ALIGN."""
    at = table + i * 6
    row = tl.multiple_of(tl.load(at + 1).to(tl.int64), ALIGN)
    column = tl.multiple_of(tl.load(at + 2).to(tl.int64), ALIGN)
    before = tl.multiple_of(tl.load(at + 4).to(tl.int64), ALIGN)
    own = tl.multiple_of(tl.load(at + 5).to(tl.int64), ALIGN)
    return tl.load(at), row, column, tl.multiple_of(tl.load(at + 3), ALIGN), before, own


@triton.jit
def clamp_columns(j, width, ALIGN: tl.constexpr):
    """Columns j below `width`, which ALIGN divides, else 0, where a store masks what is computed.

    Neighbours in groups of ALIGN are inside or outside together. `tl.where` hides that from the
    compiler, which would then load element by element and not by asynchronous copies; a group that
    is outside reads the first ALIGN columns.
    """
    return tl.max_contiguous(tl.multiple_of(tl.where(j < width, j, 0), ALIGN), ALIGN)


@triton.jit
def packed(order, r, live, tokens):
    """Image and token of packed rows; the first kept image's where there is none."""
    inside = r < live
    image = tl.load(order + r // tokens, mask=inside, other=0).to(tl.int64)
    return image, tl.where(inside, r % tokens, 0).to(tl.int64), inside


@triton.jit(do_not_specialize=["rows", "tokens", "images"])
def first_linear(
    x, weight, bias, z, h, table, order, count, rows, tokens, images, width, x_image, x_token,
    row_tiles, column_tiles,
    PACKED: tl.constexpr, KEEP_Z: tl.constexpr, ALIGN: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """z = x W1^T + b1 and h = gelu(z) of one rung, into the teachers' matrices."""
    row_tile, column_tile = place(row_tiles, column_tiles, GROUP)
    teacher, first, column, valid, before, own = entry(table, column_tile, ALIGN)
    r = row_tile * ROWS + tl.arange(0, ROWS)
    if PACKED:
        live = tl.load(count + teacher) * tokens
        if row_tile * ROWS >= live:
            return
        image, token, inside = packed(order + teacher * images, r, live, tokens)
    else:
        inside = r < rows
        image = tl.where(inside, r // tokens, 0).to(tl.int64)
        token = tl.where(inside, r % tokens, 0).to(tl.int64)
    j = tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    x_at = x + (image * x_image + token * x_token)[:, None] + k[None, :]
    w_at = weight + (first + tl.where(j < valid, j, 0))[None, :] * width + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, INNER):
        if EVEN:
            a = tl.load(x_at)
            b = tl.load(w_at)
        else:
            a = tl.load(x_at, mask=k[None, :] < width - start, other=0.0)
            b = tl.load(w_at, mask=k[:, None] < width - start, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_at += INNER
        w_at += INNER
    total += tl.load(bias + first + j, mask=j < valid, other=0.0).to(tl.float32)[None, :]
    total = total.to(h.dtype.element_ty)  # forward, recomputation and backward see the same z
    mask = inside[:, None] & (j < valid)[None, :]
    at = before * rows + (image * tokens + token)[:, None] * own + column + j[None, :]
    if KEEP_Z:
        tl.store(z + at, total, mask=mask)
    tl.store(h + at, gelu(total.to(tl.float32)).to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def find_kept(
    dy, keep, part, tokens, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Set keep[image] where dy has anything but zeros; sums over an image's tokens for db2."""
    image = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    found = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, tokens, ROWS):
        n = start + tl.arange(0, ROWS)
        mask = (n < tokens)[:, None] & (j < width)[None, :]
        at = (image * tokens + n)[:, None] * width + j[None, :]
        value = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value, 0)
        found = tl.maximum(found, (value != 0.0).to(tl.int32))
    tl.store(part + image * width + j, total, mask=j < width)
    # Programs of one image may all write here, but all write the same.
    tl.store(keep + image, 1, mask=tl.max(tl.max(found, 1), 0) > 0)


@triton.jit(do_not_specialize=["rows", "tokens"])
def hidden_gradient(
    dy, weight, z, dz, part, order, count, rows, tokens, width, before, own, total_width,
    row_tiles, column_tiles,
    ALIGN: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz = (dy W2) gelu'(z) of one teacher's kept images, and its sums over a tile's rows."""
    row_tile, column_tile = place(row_tiles, column_tiles, GROUP)
    live = tl.load(count) * tokens
    if row_tile * ROWS >= live:
        return
    r = row_tile * ROWS + tl.arange(0, ROWS)
    image, token, inside = packed(order, r, live, tokens)
    row = image * tokens + token
    j = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    dy_at = dy + row[:, None] * width + k[None, :]
    w_at = weight + k[:, None].to(tl.int64) * own + clamp_columns(j, own, ALIGN)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, INNER):
        if EVEN:
            a = tl.load(dy_at)
            b = tl.load(w_at)
        else:
            a = tl.load(dy_at, mask=k[None, :] < width - start, other=0.0)
            b = tl.load(w_at, mask=k[:, None] < width - start, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        dy_at += INNER
        w_at += INNER * own
    mask = inside[:, None] & (j < own)[None, :]
    at = before * rows.to(tl.int64) + row[:, None] * own + j[None, :]
    old = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.where(mask, total * gelu_slope(old), 0.0)
    tl.store(dz + at, total.to(dz.dtype.element_ty), mask=mask)
    part += row_tile.to(tl.int64) * total_width + before
    tl.store(part + j, tl.sum(total, 0), mask=j < own)


@triton.jit(do_not_specialize=["rows", "tokens", "images", "blocks"])
def input_gradient(
    dz, weight, dx, table, keep, rows, tokens, images, width, blocks, row_tiles, column_tiles,
    ALIGN: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx = sum over kept teachers of dz W1, of one rung."""
    row_tile, column_tile = place(row_tiles, column_tiles, GROUP)
    r = row_tile * ROWS + tl.arange(0, ROWS)
    image = tl.where(r < rows, r // tokens, 0)
    row = tl.where(r < rows, r, 0).to(tl.int64)
    j = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    d = clamp_columns(j, width, ALIGN)
    k = tl.arange(0, INNER)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(blocks):
        teacher, first, column, valid, before, own = entry(table, i, ALIGN)
        kept = tl.load(keep + teacher * images + image, mask=r < rows, other=0)
        if tl.max(kept, 0) > 0:
            dz_at = dz + before * rows + row[:, None] * own + column + k[None, :]
            w_at = weight + (first + k)[:, None] * width + d[None, :]
            for start in range(0, valid, INNER):
                if EVEN:  # the rows of dropped images were never written
                    a = tl.load(dz_at, mask=kept[:, None] > 0, other=0.0)
                    b = tl.load(w_at)
                else:
                    inside = k < valid - start
                    a = tl.load(dz_at, mask=(kept[:, None] > 0) & inside[None, :], other=0.0)
                    b = tl.load(w_at, mask=inside[:, None], other=0.0)
                total = tl.dot(a, b, total, input_precision="ieee")
                dz_at += INNER
                w_at += INNER * width
    mask = (r < rows)[:, None] & (j < width)[None, :]
    at = row[:, None] * width + j[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens", "images"])
def weight_gradient(
    left, right, out, table, order, count, rows, tokens, images, width, right_image, right_token,
    row_tiles, column_tiles,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """left^T right over a teacher's kept rows: dW1 (dz and x) or dW2 (dy and h)."""
    row_tile, column_tile = place(row_tiles, column_tiles, GROUP)
    teacher, first, column, valid, before, own = entry(table, row_tile, ALIGN)
    live = tl.load(count + teacher) * tokens
    i = tl.arange(0, ROWS)
    j = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    left += before * rows + column + clamp_columns(i, valid, ALIGN)[None, :]
    right += clamp_columns(j, width, ALIGN)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, live, INNER):
        r = start + tl.arange(0, INNER)
        image, token, inside = packed(order + teacher * images, r, live, tokens)
        row = image * tokens + token
        a = tl.load(left + row[:, None] * own, mask=inside[:, None], other=0.0)
        at = (image * right_image + token * right_token)[:, None]
        b = tl.load(right + at, mask=inside[:, None], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    mask = (i < valid)[:, None] & (j < width)[None, :]
    at = (first + i)[:, None] * width + j[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
