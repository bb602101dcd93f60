"""Triton kernels of `image_losses` (its maths and shapes), their configs and their launchers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from unic_kernels.device import Build, beside, dense, pick

WEIGHTS = tuple(f"{kind}_w{i}" for kind in ("cls", "patch") for i in (1, 2, 3))
STRIDES = ("cls_b", "patch_b", "patch_n")


@triton.jit
def _place(cls, patch, cls_b, patch_b, patch_n, image, row, is_patch):
    """Where a chunk's rows begin, in the CLS or in the patch tokens."""
    start = tl.where(is_patch, image * patch_b, image * cls_b)
    return tl.where(is_patch, patch, cls), (start + row.to(tl.int64) * patch_n)[:, None]


@triton.jit
def _tile(p_ptr, p_row, x_ptr, x_row, mean, std, channel, width, alive, clamp, eps):
    """Predictions and standardised targets of rows x channels, 0 outside of them."""
    inside = channel < width
    mask = alive[:, None] & inside[None, :]
    p = tl.load(p_ptr + p_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    m = tl.load(mean + channel, mask=inside, other=0.0)
    s = tl.load(std + channel, mask=inside, other=1.0)
    t = (x - m[None, :]) * (1.0 / (s + eps))[None, :]
    # Compared, since minimum would hide a NaN that the step must see.
    t = tl.where(t > clamp, clamp, tl.where(t < -clamp, -clamp, t))
    return p, tl.where(mask, t, 0.0)


@triton.jit(do_not_specialize=["teacher", "cls_looked", "patch_looked"])
def row_losses(
    p_cls, p_patch, x_cls, x_patch, mean, std, part, stat,
    teacher, images, patches, width, cls_looked, patch_looked,
    p_cls_b, p_patch_b, p_patch_n, x_cls_b, x_patch_b, x_patch_n,
    cls_w1, cls_w2, cls_w3, patch_w1, patch_w2, patch_w3, clamp, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of a chunk's rows, and its share of the image's loss, cosine and smooth_l1."""
    chunks = 1 + tl.cdiv(patches, ROWS)
    image, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    is_patch = chunk > 0
    row = tl.where(is_patch, (chunk - 1) * ROWS, 0) + tl.arange(0, ROWS)
    count = tl.where(is_patch, patches, 1)
    alive = row < tl.where(is_patch, patches * patch_looked, cls_looked)
    p_ptr, p_row = _place(p_cls, p_patch, p_cls_b, p_patch_b, p_patch_n, image, row, is_patch)
    x_ptr, x_row = _place(x_cls, x_patch, x_cls_b, x_patch_b, x_patch_n, image, row, is_patch)
    kind = tl.where(is_patch, width, 0)
    pt = tl.zeros((ROWS,), tl.float32)
    pp, tt, smooth, square = pt, pt, pt, pt
    for start in range(0, width, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        p, t = _tile(
            p_ptr, p_row, x_ptr, x_row, mean + kind, std + kind, channel, width, alive, clamp, eps
        )
        pt += tl.sum(p * t, 1)
        pp += tl.sum(p * p, 1)
        tt += tl.sum(t * t, 1)
        d = tl.abs(p - t)
        smooth += tl.sum(tl.where(d < 1.0, 0.5 * d * d, d - 0.5), 1)
        square += tl.sum(d * d, 1)
    cosine = pt / (tl.maximum(tl.sqrt(pp), 1e-8) * tl.maximum(tl.sqrt(tt), 1e-8))
    smooth, square = smooth / width, square / width
    loss = tl.where(is_patch, patch_w1, cls_w1) * (1.0 - cosine)
    loss += tl.where(is_patch, patch_w2, cls_w2) * smooth
    loss += tl.where(is_patch, patch_w3, cls_w3) * square
    pair = teacher * images + image
    out = part + (pair * chunks + chunk) * 3
    tl.store(out, tl.sum(tl.where(alive, loss, 0.0), 0))
    tl.store(out + 1, tl.sum(tl.where(alive, cosine, 0.0), 0) / count)
    tl.store(out + 2, tl.sum(tl.where(alive, smooth, 0.0), 0) / count)
    out = stat + (pair * (1 + patches) + tl.where(is_patch, 1, 0) + row) * 3
    tl.store(out, pt, mask=alive)
    tl.store(out + 1, pp, mask=alive)
    tl.store(out + 2, tt, mask=alive)


@triton.jit
def image_sums(part, loss, gap, images, chunks, BLOCK: tl.constexpr):
    """Loss, and cosine and smooth_l1 of either kind, of one teacher and image from its chunks."""
    pair = tl.program_id(1).to(tl.int64) * images + tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    at = part + (pair * chunks + chunk) * 3
    mask = chunk < chunks
    tl.store(loss + pair, tl.sum(tl.load(at, mask=mask, other=0.0), 0))
    for i in range(2):
        value = tl.load(at + 1 + i, mask=mask, other=0.0)
        tl.store(gap + pair * 4 + i, tl.sum(tl.where(chunk == 0, value, 0.0), 0))
        tl.store(gap + pair * 4 + 2 + i, tl.sum(tl.where(chunk == 0, 0.0, value), 0))


@triton.jit(do_not_specialize=["teacher", "cls_looked", "patch_looked", "grad_t", "grad_b"])
def row_grads(
    p_cls, p_patch, x_cls, x_patch, mean, std, stat, grad, d_cls, d_patch,
    teacher, images, patches, width, cls_looked, patch_looked, grad_t, grad_b,
    p_cls_b, p_patch_b, p_patch_n, x_cls_b, x_patch_b, x_patch_n,
    cls_w1, cls_w2, cls_w3, patch_w1, patch_w2, patch_w3, clamp, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's predictions; those of an image whose gradient is 0 cost a store."""
    chunks = 1 + tl.cdiv(patches, ROWS)
    image, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    is_patch = chunk > 0
    row = tl.where(is_patch, (chunk - 1) * ROWS, 0) + tl.arange(0, ROWS)
    rows = tl.where(is_patch, patches * patch_looked, cls_looked)
    g = tl.load(grad + teacher.to(tl.int64) * grad_t + image * grad_b).to(tl.float32)
    alive = row < tl.where(g != 0.0, rows, 0)
    p_ptr, p_row = _place(p_cls, p_patch, p_cls_b, p_patch_b, p_patch_n, image, row, is_patch)
    x_ptr, x_row = _place(x_cls, x_patch, x_cls_b, x_patch_b, x_patch_n, image, row, is_patch)
    d_ptr, d_row = _place(d_cls, d_patch, width, patches * width, width, image, row, is_patch)
    at = stat + ((teacher * images + image) * (1 + patches) + tl.where(is_patch, 1, 0) + row) * 3
    pt = tl.load(at, mask=alive, other=0.0)
    p_norm = tl.sqrt(tl.load(at + 1, mask=alive, other=0.0))
    t_norm = tl.maximum(tl.sqrt(tl.load(at + 2, mask=alive, other=0.0)), 1e-8)
    by_t = 1.0 / (tl.maximum(p_norm, 1e-8) * t_norm)
    by_p = pt * by_t / (tl.maximum(p_norm, 1e-8) * tl.where(p_norm == 0.0, 1.0, p_norm))
    by_p = tl.where(p_norm == 0.0, 0.0, by_p)
    w1 = g * tl.where(is_patch, patch_w1, cls_w1)
    w2 = g * tl.where(is_patch, patch_w2, cls_w2) / width
    w3 = g * tl.where(is_patch, patch_w3, cls_w3) / width * 2.0
    kind = tl.where(is_patch, width, 0)
    for start in range(0, width, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        p, t = _tile(
            p_ptr, p_row, x_ptr, x_row, mean + kind, std + kind, channel, width, alive, clamp, eps
        )
        d = p - t
        value = w1 * (by_p[:, None] * p - by_t[:, None] * t) + w3 * d
        value += w2 * tl.where(d > 1.0, 1.0, tl.where(d < -1.0, -1.0, d))
        to = (row < rows)[:, None] & (channel < width)[None, :]
        tl.store(d_ptr + d_row + channel[None, :], value.to(d_patch.dtype.element_ty), mask=to)


class Config(NamedTuple):
    """Rows and channels of a tile. A warp owns whole rows, so that no sum crosses warps."""

    rows: int
    block: int
    warps: int


CONFIGS = {80: Config(8, 256, 4), 90: Config(8, 256, 4), 100: Config(8, 256, 4)}


class Lists(NamedTuple):
    """What both directions read; two entries per teacher, cls and patch, but one of mean, std."""

    pred: list[Tensor]
    target: list[Tensor]
    mean: list[Tensor]
    std: list[Tensor]
    weight: list[float]  # six per teacher: `TERMS` of cls, of patch, over tokens and kinds
    looks: list[bool]  # whether a kind is learned
    clamp: float
    eps: float

    @property
    def extent(self) -> tuple[int, int, int]:
        """T, B, N; N is 0 where no patch tokens are learned."""
        learned = [x for x, look in zip(self.pred, self.looks, strict=True) if look]
        patches = [x.shape[1] for x in learned if x.dim() == 3]
        return len(self.mean), len(learned[0]), patches[0] if patches else 0

    def arguments(self, teacher: int) -> dict[str, object]:
        """What both kernels take, for one teacher."""
        cls_looked, patch_looked = self.looks[2 * teacher : 2 * teacher + 2]
        found: dict[str, object] = {
            "cls_looked": int(cls_looked),
            "patch_looked": int(patch_looked),
        }
        for name, side in (("p", self.pred), ("x", self.target)):
            cls, patch = map(dense, side[2 * teacher : 2 * teacher + 2])
            found[f"{name}_cls_b"] = cls.stride(0) if cls_looked else 0
            found[f"{name}_patch_b"] = patch.stride(0) if patch_looked else 0
            found[f"{name}_patch_n"] = patch.stride(1) if patch_looked else 0
            # The tensors of a kind that is not learned may be of any type; they are not read.
            found[f"{name}_cls"] = cls if cls_looked else patch
            found[f"{name}_patch"] = patch if patch_looked else cls
        found |= zip(WEIGHTS, self.weight[6 * teacher : 6 * teacher + 6], strict=True)
        found |= {"mean": self.mean[teacher].contiguous(), "std": self.std[teacher].contiguous()}
        images, patches = self.extent[1:]
        found |= {"teacher": teacher, "images": images, "patches": patches}
        found |= {"width": self.mean[teacher].shape[1], "clamp": self.clamp, "eps": self.eps}
        return found


def forward_triton(given: Lists) -> tuple[Tensor, Tensor, Tensor]:
    """T + 1 launches."""
    teachers, images, patches = given.extent
    loss_TB, gap_TB22, stat_TBR3 = empty_results(given)
    config = pick(CONFIGS, loss_TB.device)
    chunks = 1 + triton.cdiv(patches, config.rows)
    part_TBJ3 = loss_TB.new_empty(teachers, images, chunks, 3)
    if images == 0:
        return loss_TB, gap_TB22, stat_TBR3
    with beside(loss_TB):
        for teacher in range(teachers):
            row_losses[(images * chunks,)](
                **given.arguments(teacher),
                part=part_TBJ3,
                stat=stat_TBR3,
                ROWS=config.rows,
                BLOCK=config.block,
                num_warps=config.warps,
            )
        block = triton.next_power_of_2(chunks)
        image_sums[(images, teachers)](
            part_TBJ3, loss_TB, gap_TB22, images, chunks, BLOCK=block, num_warps=1
        )
    return loss_TB, gap_TB22, stat_TBR3


def backward_triton(given: Lists, stat_TBR3: Tensor, grad_TB: Tensor) -> list[Tensor]:
    """T launches; the gradients of the kinds that are learned."""
    teachers, images, patches = given.extent
    config = pick(CONFIGS, stat_TBR3.device)
    grads = empty_grads(given)
    if images == 0:
        return grads
    chunks = 1 + triton.cdiv(patches, config.rows)
    left = iter(grads)
    with beside(stat_TBR3):
        for teacher in range(teachers):
            looks = given.looks[2 * teacher : 2 * teacher + 2]
            own = [next(left) for look in looks if look]
            row_grads[(images * chunks,)](
                **given.arguments(teacher),
                stat=stat_TBR3,
                grad=grad_TB,
                grad_t=grad_TB.stride(0),
                grad_b=grad_TB.stride(1),
                d_cls=own[0],
                d_patch=own[-1],
                ROWS=config.rows,
                BLOCK=config.block,
                num_warps=config.warps,
            )
    return grads


def empty_results(given: Lists) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the losses, gaps and row statistics."""
    teachers, images, patches = given.extent
    like = given.mean[0]
    return (
        like.new_empty(teachers, images),
        like.new_empty(teachers, images, 2, 2),
        like.new_empty(teachers, images, 1 + patches, 3),
    )


def empty_grads(given: Lists) -> list[Tensor]:
    """Room for the gradients of the kinds that are learned."""
    learned = zip(given.pred, given.looks, strict=True)
    return [x.new_empty(x.shape) for x, look in learned if look]


def builds(arch: int) -> Iterator[Build]:
    """Every variant that ships for an architecture: bf16 features, predictions in bf16 or fp32."""
    rows, block, warps = CONFIGS[arch]
    integers = ("images", "patches", "width", *(f"{x}_{y}" for x in "px" for y in STRIDES))
    numbers = (*WEIGHTS, "clamp", "eps")
    types = dict.fromkeys(("teacher", "cls_looked", "patch_looked", *integers), "i32")
    types |= dict.fromkeys(numbers, "fp32") | dict.fromkeys(("grad_t", "grad_b"), "i32")
    types |= dict.fromkeys(("mean", "std", "part", "stat", "grad"), "*fp32")
    types |= dict.fromkeys(("x_cls", "x_patch"), "*bf16")
    aligned = frozenset(integers) - {"images"}
    for pred in ("bf16", "fp32"):
        types |= dict.fromkeys(("p_cls", "p_patch", "d_cls", "d_patch"), f"*{pred}")
        for kernel in (row_losses, row_grads):
            own = {key: types[key] for key in kernel.arg_names if key in types}
            name, constants = f"{kernel.__name__} {pred}", {"ROWS": rows, "BLOCK": block}
            yield Build(name, kernel, own, constants, {"num_warps": warps}, aligned)
    types = dict.fromkeys(("part", "loss", "gap"), "*fp32")
    types |= dict.fromkeys(("images", "chunks"), "i32")
    yield Build("image_sums", image_sums, types, {"BLOCK": 64}, {"num_warps": 1})
