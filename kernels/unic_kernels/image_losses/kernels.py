"""Triton kernels of `image_losses`, each with the types of its arguments; `op.py` has the maths.

A program works on a chunk of an image's rows: chunk 0 is the CLS token, the others are BLOCK_N
patch tokens each. In names p is a prediction, x a raw feature, t the standardised target.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOSS, COSINE, SMOOTH_L1, NUM_PARTS = (tl.constexpr(i) for i in range(4))
"""Columns of `part`: a chunk's share of its image."""
DOT_PT, DOT_PP, DOT_TT, NUM_STATS = (tl.constexpr(i) for i in range(4))
"""Columns of `stat`: row statistics."""
CLS_GAPS, PATCH_GAPS, NUM_GAPS = (tl.constexpr(i) for i in (0, 2, 4))
"""Columns of `gap`: cosine and smooth_l1 of either kind."""


@triton.jit
def chunk_of_program(patches, BLOCK_N: tl.constexpr):
    """Image and chunk of this program, chunks of an image, if it is of patches, its rows."""
    chunks = 1 + tl.cdiv(patches, BLOCK_N)
    image, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    is_patch = chunk > 0
    row = tl.where(is_patch, (chunk - 1) * BLOCK_N, 0) + tl.arange(0, BLOCK_N)
    return image, chunk, chunks, is_patch, row


@triton.jit
def rows_of_kind(cls, patch, stride_cls_b, stride_patch_b, stride_patch_n, image, row, is_patch):
    """Pointer to the CLS or to the patch tokens, and offsets of a chunk's rows from it."""
    start = tl.where(is_patch, image * stride_patch_b, image * stride_cls_b)
    return tl.where(is_patch, patch, cls), (start + row.to(tl.int64) * stride_patch_n)[:, None]


@triton.jit
def load_tile(p_ptr, p_row, x_ptr, x_row, mean, std, channel, width, inside, clamp, eps):
    """Predictions and standardised targets of rows x channels, 0 outside of them."""
    in_width = channel < width
    mask = inside[:, None] & in_width[None, :]
    p = tl.load(p_ptr + p_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    m = tl.load(mean + channel, mask=in_width, other=0.0)
    s = tl.load(std + channel, mask=in_width, other=1.0)
    t = (x - m[None, :]) * (1.0 / (s + eps))[None, :]
    # Compared, since minimum would hide a NaN, which must reach the loss.
    t = tl.where(t > clamp, clamp, tl.where(t < -clamp, -clamp, t))
    return p, tl.where(mask, t, 0.0)


@triton.jit(do_not_specialize=["teacher", "cls_learned", "patch_learned"])
def row_losses_kernel(
    p_cls, p_patch, x_cls, x_patch, mean, std, part, stat,
    teacher, images, patches, width, cls_learned, patch_learned,
    stride_p_cls_b, stride_p_patch_b, stride_p_patch_n,
    stride_x_cls_b, stride_x_patch_b, stride_x_patch_n,
    w_cls_cosine, w_cls_smooth_l1, w_cls_mse, w_patch_cosine, w_patch_smooth_l1, w_patch_mse,
    clamp, eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the statistics of a chunk's rows, and its part of the image's loss and gaps."""
    image, chunk, chunks, is_patch, row = chunk_of_program(patches, BLOCK_N)
    count = tl.where(is_patch, patches, 1)
    inside = row < tl.where(is_patch, patches * patch_learned, cls_learned)
    p_ptr, p_row = rows_of_kind(
        p_cls, p_patch, stride_p_cls_b, stride_p_patch_b, stride_p_patch_n, image, row, is_patch
    )
    x_ptr, x_row = rows_of_kind(
        x_cls, x_patch, stride_x_cls_b, stride_x_patch_b, stride_x_patch_n, image, row, is_patch
    )
    kind = tl.where(is_patch, width, 0)
    pt = tl.zeros((BLOCK_N,), tl.float32)
    pp, tt, smooth_l1, mse = pt, pt, pt, pt
    for start in range(0, width, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        p, t = load_tile(
            p_ptr, p_row, x_ptr, x_row, mean + kind, std + kind, channel, width, inside, clamp, eps
        )
        pt += tl.sum(p * t, 1)
        pp += tl.sum(p * p, 1)
        tt += tl.sum(t * t, 1)
        d = tl.abs(p - t)
        smooth_l1 += tl.sum(tl.where(d < 1.0, 0.5 * d * d, d - 0.5), 1)
        mse += tl.sum(d * d, 1)
    cosine = pt / (tl.maximum(tl.sqrt(pp), 1e-8) * tl.maximum(tl.sqrt(tt), 1e-8))
    smooth_l1, mse = smooth_l1 / width, mse / width
    loss = tl.where(is_patch, w_patch_cosine, w_cls_cosine) * (1.0 - cosine)
    loss += tl.where(is_patch, w_patch_smooth_l1, w_cls_smooth_l1) * smooth_l1
    loss += tl.where(is_patch, w_patch_mse, w_cls_mse) * mse
    pair = teacher * images + image
    out = part + (pair * chunks + chunk) * NUM_PARTS
    tl.store(out + LOSS, tl.sum(tl.where(inside, loss, 0.0), 0))
    tl.store(out + COSINE, tl.sum(tl.where(inside, cosine, 0.0), 0) / count)
    tl.store(out + SMOOTH_L1, tl.sum(tl.where(inside, smooth_l1, 0.0), 0) / count)
    out = stat + (pair * (1 + patches) + tl.where(is_patch, 1, 0) + row) * NUM_STATS
    tl.store(out + DOT_PT, pt, mask=inside)
    tl.store(out + DOT_PP, pp, mask=inside)
    tl.store(out + DOT_TT, tt, mask=inside)


ROW_LOSSES_TYPES = {
    "*{pred}:16": "p_cls p_patch",
    "*{target}:16": "x_cls x_patch",
    "*fp32:16": "mean std part stat",
    "i32": "teacher images cls_learned patch_learned",
    "i32:16": "patches width stride_p_cls_b stride_p_patch_b stride_p_patch_n"
    " stride_x_cls_b stride_x_patch_b stride_x_patch_n",
    "fp32": "w_cls_cosine w_cls_smooth_l1 w_cls_mse w_patch_cosine w_patch_smooth_l1 w_patch_mse"
    " clamp eps",
}


@triton.jit
def image_sums_kernel(part, loss, gap, images, chunks, BLOCK_J: tl.constexpr):
    """Write the loss and the gaps of one teacher and image from its chunks."""
    pair = tl.program_id(1).to(tl.int64) * images + tl.program_id(0)
    chunk = tl.arange(0, BLOCK_J)
    ptr = part + (pair * chunks + chunk) * NUM_PARTS
    mask = chunk < chunks
    tl.store(loss + pair, tl.sum(tl.load(ptr + LOSS, mask=mask, other=0.0), 0))
    for i in range(2):
        value = tl.load(ptr + COSINE + i, mask=mask, other=0.0)
        out = gap + pair * NUM_GAPS + i
        tl.store(out + CLS_GAPS, tl.sum(tl.where(chunk == 0, value, 0.0), 0))
        tl.store(out + PATCH_GAPS, tl.sum(tl.where(chunk == 0, 0.0, value), 0))


IMAGE_SUMS_TYPES = {"*fp32:16": "part loss gap", "i32": "images chunks"}


@triton.jit(
    do_not_specialize=["teacher", "cls_learned", "patch_learned", "stride_grad_t", "stride_grad_b"]
)
def row_grads_kernel(
    p_cls, p_patch, x_cls, x_patch, mean, std, stat, grad, d_cls, d_patch,
    teacher, images, patches, width, cls_learned, patch_learned, stride_grad_t, stride_grad_b,
    stride_p_cls_b, stride_p_patch_b, stride_p_patch_n,
    stride_x_cls_b, stride_x_patch_b, stride_x_patch_n,
    w_cls_cosine, w_cls_smooth_l1, w_cls_mse, w_patch_cosine, w_patch_smooth_l1, w_patch_mse,
    clamp, eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk's predictions; an image whose gradient is 0 costs a store."""
    image, _, _, is_patch, row = chunk_of_program(patches, BLOCK_N)
    rows = tl.where(is_patch, patches * patch_learned, cls_learned)
    g = tl.load(grad + teacher.to(tl.int64) * stride_grad_t + image * stride_grad_b).to(tl.float32)
    inside = row < tl.where(g != 0.0, rows, 0)
    p_ptr, p_row = rows_of_kind(
        p_cls, p_patch, stride_p_cls_b, stride_p_patch_b, stride_p_patch_n, image, row, is_patch
    )
    x_ptr, x_row = rows_of_kind(
        x_cls, x_patch, stride_x_cls_b, stride_x_patch_b, stride_x_patch_n, image, row, is_patch
    )
    d_ptr, d_row = rows_of_kind(d_cls, d_patch, width, patches * width, width, image, row, is_patch)
    stat_row = (teacher * images + image) * (1 + patches) + tl.where(is_patch, 1, 0) + row
    stat_ptr = stat + stat_row * NUM_STATS
    pt = tl.load(stat_ptr + DOT_PT, mask=inside, other=0.0)
    p_norm = tl.sqrt(tl.load(stat_ptr + DOT_PP, mask=inside, other=0.0))
    t_norm = tl.maximum(tl.sqrt(tl.load(stat_ptr + DOT_TT, mask=inside, other=0.0)), 1e-8)
    by_t = 1.0 / (tl.maximum(p_norm, 1e-8) * t_norm)
    by_p = pt * by_t / (tl.maximum(p_norm, 1e-8) * tl.where(p_norm == 0.0, 1.0, p_norm))
    by_p = tl.where(p_norm == 0.0, 0.0, by_p)
    w_cosine = g * tl.where(is_patch, w_patch_cosine, w_cls_cosine)
    w_smooth_l1 = g * tl.where(is_patch, w_patch_smooth_l1, w_cls_smooth_l1) / width
    w_mse = g * tl.where(is_patch, w_patch_mse, w_cls_mse) / width * 2.0
    kind = tl.where(is_patch, width, 0)
    for start in range(0, width, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        p, t = load_tile(
            p_ptr, p_row, x_ptr, x_row, mean + kind, std + kind, channel, width, inside, clamp, eps
        )
        d = p - t
        value = w_cosine * (by_p[:, None] * p - by_t[:, None] * t) + w_mse * d
        value += w_smooth_l1 * tl.where(d > 1.0, 1.0, tl.where(d < -1.0, -1.0, d))
        mask = (row < rows)[:, None] & (channel < width)[None, :]
        tl.store(d_ptr + d_row + channel[None, :], value.to(d_patch.dtype.element_ty), mask=mask)


ROW_GRADS_TYPES = {
    "*{pred}:16": "p_cls p_patch d_cls d_patch",
    "*{target}:16": "x_cls x_patch",
    "*fp32:16": "mean std stat grad",
    "i32": "teacher images cls_learned patch_learned stride_grad_t stride_grad_b",
    "i32:16": "patches width stride_p_cls_b stride_p_patch_b stride_p_patch_n"
    " stride_x_cls_b stride_x_patch_b stride_x_patch_n",
    "fp32": "w_cls_cosine w_cls_smooth_l1 w_cls_mse w_patch_cosine w_patch_smooth_l1 w_patch_mse"
    " clamp eps",
}
