"""The ladder's algebra in torch, for CPU tensors: same GEMMs, row-sparse backward by index.

Every rung's first Linear writes straight into its columns of the hidden buffer (`out=` a strided
view), so nothing is concatenated. The backward goes teacher by teacher over the images that the
teacher keeps, whole images at a time: what a GEMM reads is gathered, the rest is read in place.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from unic_kernels.buffers import buffer
from unic_kernels.ladder.layout import Layout

aten = torch.ops.aten


def forward(
    x: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    b2: list[Tensor],
    layout: Layout,
    recompute: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Predictions per teacher, z and h; these are empty unless they are kept."""
    images, tokens, _ = x[0].shape
    rows = images * tokens
    z = buffer((rows * layout.total,), x[0].dtype)
    for rung in range(len(x)):
        first_linear(z, x[rung].flatten(0, 1), w1[rung], b1[rung], layout, rung)
    if recompute == "none":
        h = aten.gelu.out(z, out=buffer(z.shape, z.dtype))
        parts = [layout.of(h, teacher, rows) for teacher in range(len(w2))]
    else:  # one teacher's hidden at a time, in a buffer that all share
        h = buffer((rows * max(layout.width_T),), z.dtype)
        parts = [h[: rows * width].view(rows, width) for width in layout.width_T]
    y = []
    for teacher, h_MK in enumerate(parts):
        if recompute != "none":
            aten.gelu.out(layout.of(z, teacher, rows), out=h_MK)
        y_MC = torch.addmm(b2[teacher], h_MK, w2[teacher].T)
        y.append(y_MC.unflatten(0, (images, tokens)))
    nothing = x[0].new_empty(0)
    kept_z, kept_h = recompute != "all", recompute == "none"
    return y, z if kept_z else nothing, h if kept_h else nothing.clone()


def first_linear(
    z: Tensor, x_MD: Tensor, weight_HD: Tensor, bias_H: Tensor, layout: Layout, rung: int
) -> None:
    """Write a rung's pre-activations of all teachers into their columns of `z`: one batched GEMM
    where the layout is even.
    """
    rows, teachers = len(x_MD), len(layout.width_T)
    if layout.even:
        _, _, column, width = layout.rungs[rung][0]
        torch.baddbmm(
            bias_H.view(teachers, 1, width),
            x_MD.expand(teachers, *x_MD.shape),
            weight_HD.unflatten(0, (teachers, width)).transpose(1, 2),
            out=z.view(teachers, rows, layout.width_T[0])[:, :, column : column + width],
        )
        return
    for teacher, row, column, width in layout.rungs[rung]:
        own = slice(row, row + width)
        out = layout.of(z, teacher, rows)[:, column : column + width]
        torch.addmm(bias_H[own], x_MD, weight_HD[own].T, out=out)


def backward(
    dy: list[Tensor],
    x: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    z: Tensor,
    h: Tensor,
    layout: Layout,
    recompute: str,
    need_x: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x (empty unless needed), w1, b1, w2, b2, over kept (teacher, image) pairs."""
    shape = x[0].shape[:2]
    rows = shape.numel()
    dx = [torch.zeros_like(x_BND, memory_format=torch.contiguous_format) for x_BND in x if need_x]
    dw1, db1 = [buffer(w.shape, w.dtype) for w in w1], [torch.empty_like(b) for b in b1]
    dw2, db2 = [buffer(w.shape, w.dtype) for w in w2], []
    room = [buffer((rows * max(layout.width_T),), x[0].dtype) for _ in range(2)]
    for teacher, weight_CK in enumerate(w2):
        kept = kept_images(dy[teacher])
        dy_k = rows_of(dy[teacher], kept)
        size = (len(dy_k), layout.width_T[teacher])
        h_k, dz_k = (flat[: size[0] * size[1]].view(size) for flat in room)
        if recompute == "all":
            z_k = pre_activations(x, w1, b1, layout, teacher, kept)
            pieces = [(slice(None), z_k)]
        else:
            z_MK = layout.of(z, teacher, rows)
            pieces = [(packed, z_MK[inside]) for inside, packed in runs_of(kept, *shape)]
        if recompute == "none":
            h_k = rows_of(layout.of(h, teacher, rows).unflatten(0, shape), kept)
        else:
            for packed, z_nK in pieces:
                aten.gelu.out(z_nK, out=h_k[packed])
        torch.mm(dy_k.T, h_k, out=dw2[teacher])
        db2.append(dy_k.sum(0))
        torch.mm(dy_k, weight_CK, out=dz_k)
        for packed, z_nK in pieces:
            aten.gelu_backward.grad_input(dz_k[packed], z_nK, grad_input=dz_k[packed])
        first_gradients(dz_k, x, w1, layout, teacher, kept, dx, dw1, db1)
    return dx, dw1, db1, dw2, db2


def first_gradients(
    dz_k: Tensor,
    x: list[Tensor],
    w1: list[Tensor],
    layout: Layout,
    teacher: int,
    kept: Tensor | None,
    dx: list[Tensor],
    dw1: list[Tensor],
    db1: list[Tensor],
) -> None:
    """Add one teacher's share to `dx`; write its rows of `dw1` and `db1`."""
    sum_K = dz_k.sum(0)
    runs = runs_of(kept, *x[0].shape[:2])
    for rung in range(len(x)):
        if (block := layout.block(rung, teacher)) is None:
            continue
        own = slice(block.row, block.row + block.width)
        dz_kH = dz_k[:, block.column : block.column + block.width]
        torch.mm(dz_kH.T, rows_of(x[rung], kept), out=dw1[rung][own])
        db1[rung][own] = sum_K[block.column : block.column + block.width]
        if not dx:
            continue
        total_MD = dx[rung].flatten(0, 1)
        part_kD = torch.mm(dz_kH, w1[rung][own])
        for inside, packed in runs:
            total_MD[inside] += part_kD[packed]


def kept_images(dy_BNC: Tensor) -> Tensor | None:
    """Indices of the images with any gradient; None where that is all of them."""
    kept_B = dy_BNC.any(2).any(1).nonzero().flatten()
    return None if len(kept_B) == len(dy_BNC) else kept_B


def runs_of(kept: Tensor | None, images: int, tokens: int) -> list[tuple[slice, slice]]:
    """Runs of neighbouring kept images: their rows among all rows, and among those kept."""
    inside = range(images) if kept is None else kept.tolist()
    breaks = [i for i in range(1, len(inside)) if inside[i] > inside[i - 1] + 1]
    found = []
    for first, last in pairwise((0, *breaks, len(inside)) if inside else ()):
        size, start = (last - first) * tokens, inside[first] * tokens
        packed = slice(first * tokens, first * tokens + size)
        found.append((slice(start, start + size), packed))
    return found


def rows_of(x_BND: Tensor, kept: Tensor | None) -> Tensor:
    """Rows of the kept images, images and tokens flattened."""
    return (x_BND if kept is None else x_BND.index_select(0, kept)).flatten(0, 1)


def pre_activations(
    x: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    layout: Layout,
    teacher: int,
    kept: Tensor | None,
) -> Tensor:
    """A teacher's pre-activations of the kept rows, by its blocks of the first Linears."""
    count = (len(x[0]) if kept is None else len(kept)) * x[0].shape[1]
    z_k = buffer((count, layout.width_T[teacher]), x[0].dtype)
    for rung in range(len(x)):
        if block := layout.block(rung, teacher):
            own = slice(block.row, block.row + block.width)
            out = z_k[:, block.column : block.column + block.width]
            torch.addmm(b1[rung][own], rows_of(x[rung], kept), w1[rung][own].T, out=out)
    return z_k
