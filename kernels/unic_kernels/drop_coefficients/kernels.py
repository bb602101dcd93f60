"""The Triton kernel of `drop_coefficients`, with the types of its arguments."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_block(x, teacher, image, teachers, images):
    """A block (T, B) of a dense matrix in fp32, -inf outside."""
    mask = (teacher < teachers)[:, None] & (image < images)[None, :]
    offset = teacher[:, None].to(tl.int64) * images + image[None, :]
    return tl.load(x + offset, mask=mask, other=-float("inf")).to(tl.float32), offset, mask


@triton.jit
def kept_pairs(loss, uniform, hardest, teacher, image, teachers, images, rate,
               KEEP_HARDEST: tl.constexpr, PER_STEP: tl.constexpr):  # fmt: skip
    """Flags of the pairs of a block that are kept."""
    uniform_TB, offset, mask = load_block(uniform, teacher, image, teachers, images)
    keep_TB = uniform_TB >= rate
    if KEEP_HARDEST and PER_STEP:
        keep_TB = keep_TB | (teacher == hardest)[:, None]
    elif KEEP_HARDEST:
        loss_TB, _, _ = load_block(loss, teacher, image, teachers, images)
        keep_TB = keep_TB | (teacher[:, None] == hardest_teacher(loss_TB)[None, :])
    return keep_TB & mask, offset, mask


@triton.jit
def hardest_teacher(loss):
    """Index of the largest along the first axis; NaN is the largest, and the first wins a tie."""
    return tl.argmax(tl.where(loss == loss, loss, float("inf")), 0, tie_break_left=True)


@triton.jit(do_not_specialize=["teachers", "images"])
def drop_coefficients_kernel(
    loss, uniform, weight, out, teachers, images, rate, divisor,
    KEEP_HARDEST: tl.constexpr, PER_STEP: tl.constexpr, COUNT_KEPT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Write all coefficients, by one program."""
    teacher = tl.arange(0, BLOCK_T)
    hardest = 0
    if KEEP_HARDEST and PER_STEP:
        total_T = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, images, BLOCK_B):
            image = start + tl.arange(0, BLOCK_B)
            loss_TB, _, mask = load_block(loss, teacher, image, teachers, images)
            total_T += tl.sum(tl.where(mask, loss_TB, 0.0), 1)
        hardest = hardest_teacher(tl.where(teacher < teachers, total_T, -float("inf")))
    if COUNT_KEPT:
        count = 0.0
        for start in range(0, images, BLOCK_B):
            image = start + tl.arange(0, BLOCK_B)
            keep_TB, _, _ = kept_pairs(
                loss, uniform, hardest, teacher, image, teachers, images, rate,
                KEEP_HARDEST, PER_STEP,
            )  # fmt: skip
            count += tl.sum(tl.sum(keep_TB.to(tl.float32), 1), 0)
        divisor = tl.maximum(count, 1.0)
    weight_T = tl.load(weight + teacher, mask=teacher < teachers, other=0.0).to(tl.float32)
    for start in range(0, images, BLOCK_B):
        image = start + tl.arange(0, BLOCK_B)
        keep_TB, offset, mask = kept_pairs(
            loss, uniform, hardest, teacher, image, teachers, images, rate, KEEP_HARDEST, PER_STEP
        )
        tl.store(out + offset, tl.where(keep_TB, weight_T[:, None] / divisor, 0.0), mask=mask)


DROP_COEFFICIENTS_TYPES = {
    "*fp32:16": "loss uniform weight out",
    "i32": "teachers images",
    "fp32": "rate divisor",
}
