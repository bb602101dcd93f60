"""The ladder's algebra in torch, for CPU tensors: same GEMMs, row-sparse backward by index.

Every rung's first Linear writes straight into its columns of the hidden buffer (`out=` a strided
view), so nothing is concatenated. The backward goes teacher by teacher over the images that the
teacher keeps, whole images at a time: the rows that a GEMM reads are gathered, all others are read
in place. Axis k of a name is the rows of a teacher's kept images, images and tokens flat.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from unic_kernels.buffers import buffer
from unic_kernels.ladder.arguments import BackwardArguments, ForwardArguments, Gradients, Results
from unic_kernels.ladder.layout import Layout

aten = torch.ops.aten


def forward(given: ForwardArguments) -> Results:
    """Return predictions per teacher, z and h."""
    x, w1, b1, w2, b2, _, recompute = given
    layout, rows = given.layout, given.shape.numel()
    z = buffer((rows * layout.total,), x[0].dtype)
    for rung in range(len(x)):
        first_linear(z, x[rung].flatten(0, 1), w1[rung], b1[rung], layout, rung)
    if recompute == "none":
        h = aten.gelu.out(z, out=buffer(z.shape, z.dtype))
        parts = [layout.matrix_of(h, teacher, rows) for teacher in range(len(w2))]
    else:  # one teacher's hidden at a time, in a buffer that all share
        h = buffer((rows * max(layout.width_T),), z.dtype)
        parts = [h[: rows * width].view(rows, width) for width in layout.width_T]
    y = []
    for teacher, h_MK in enumerate(parts):
        if recompute != "none":
            aten.gelu.out(layout.matrix_of(z, teacher, rows), out=h_MK)
        y_MC = torch.addmm(b2[teacher], h_MK, w2[teacher].T)
        y.append(y_MC.unflatten(0, given.shape))
    empty = x[0].new_empty(0)
    kept_z, kept_h = recompute != "all", recompute == "none"
    return y, z if kept_z else empty, h if kept_h else empty.clone()


def first_linear(
    z: Tensor, x_MD: Tensor, weight_HD: Tensor, bias_H: Tensor, layout: Layout, rung: int
) -> None:
    """Write a rung's pre-activations of all teachers into their columns of `z`: one batched GEMM
    if the layout is even.
    """
    rows, teachers = len(x_MD), len(layout.width_T)
    if layout.even:
        block = layout.rungs[rung][0]
        torch.baddbmm(
            bias_H.view(teachers, 1, block.width),
            x_MD.expand(teachers, *x_MD.shape),
            weight_HD.unflatten(0, (teachers, block.width)).transpose(1, 2),
            out=z.view(teachers, rows, layout.width_T[0])[:, :, block.columns],
        )
        return
    for block in layout.rungs[rung]:
        out = layout.matrix_of(z, block.teacher, rows)[:, block.columns]
        torch.addmm(bias_H[block.rows], x_MD, weight_HD[block.rows].T, out=out)


def backward(given: BackwardArguments) -> Gradients:
    """Return the gradients over kept (teacher, image) pairs."""
    layout, shape, recompute = given.layout, given.shape, given.recompute
    rows = shape.numel()
    grads = empty_grads(given)
    scratch = [buffer((rows * max(layout.width_T),), given.x[0].dtype) for _ in range(2)]
    for teacher, weight_CK in enumerate(given.w2):
        dy_BNC = given.dy[teacher].contiguous()  # autograd may expand one number over it
        kept = kept_images(dy_BNC)
        dy_kC = rows_of(dy_BNC, kept)
        size = (len(dy_kC), layout.width_T[teacher])
        h_kK, dz_kK = (flat[: size[0] * size[1]].view(size) for flat in scratch)
        if recompute == "all":
            pieces = [(slice(None), pre_activations(given, teacher, kept))]
        else:
            z_MK = layout.matrix_of(given.z, teacher, rows)
            pieces = [(packed, z_MK[among_all]) for among_all, packed in runs_of(kept, *shape)]
        if recompute == "none":
            h_kK = rows_of(layout.matrix_of(given.h, teacher, rows).unflatten(0, shape), kept)
        else:
            for packed, z_nK in pieces:
                aten.gelu.out(z_nK, out=h_kK[packed])
        torch.mm(dy_kC.T, h_kK, out=grads.dw2[teacher])
        grads.db2.append(dy_kC.sum(0))
        torch.mm(dy_kC, weight_CK, out=dz_kK)
        for packed, z_nK in pieces:
            aten.gelu_backward.grad_input(dz_kK[packed], z_nK, grad_input=dz_kK[packed])
        first_linear_grad(dz_kK, given, grads, teacher, kept)
    return grads


def empty_grads(given: BackwardArguments) -> Gradients:
    """Return memory for the gradients: zeros for dx, which adds up, nothing yet for db2."""
    contiguous = torch.contiguous_format
    return Gradients(
        dx=[torch.zeros_like(x, memory_format=contiguous) for x in given.x if given.need_x],
        dw1=[buffer(w.shape, w.dtype) for w in given.w1],
        db1=[torch.empty_like(b) for b in given.b1],
        dw2=[buffer(w.shape, w.dtype) for w in given.w2],
        db2=[],
    )


def first_linear_grad(
    dz_kK: Tensor, given: BackwardArguments, grads: Gradients, teacher: int, kept: Tensor | None
) -> None:
    """Add one teacher's part of dx; write its rows of dw1 and db1."""
    sum_K = dz_kK.sum(0)
    runs = runs_of(kept, *given.shape)
    for rung, (x_BND, weight_HD) in enumerate(zip(given.x, given.w1, strict=True)):
        if (block := given.layout.block(rung, teacher)) is None:
            continue
        dz_kH = dz_kK[:, block.columns]
        torch.mm(dz_kH.T, rows_of(x_BND, kept), out=grads.dw1[rung][block.rows])
        grads.db1[rung][block.rows] = sum_K[block.columns]
        if not grads.dx:
            continue
        dx_MD = grads.dx[rung].flatten(0, 1)
        part_kD = torch.mm(dz_kH, weight_HD[block.rows])
        for among_all, packed in runs:
            dx_MD[among_all] += part_kD[packed]


def kept_images(dy_BNC: Tensor) -> Tensor | None:
    """Return the indices of the images with any gradient; None if that is all of them."""
    kept_B = dy_BNC.any(2).any(1).nonzero().flatten()
    return None if len(kept_B) == len(dy_BNC) else kept_B


def runs_of(kept: Tensor | None, images: int, tokens: int) -> list[tuple[slice, slice]]:
    """Return runs of neighbouring kept images: their rows among all rows, and among those kept."""
    indices = range(images) if kept is None else kept.tolist()
    breaks = [i for i in range(1, len(indices)) if indices[i] > indices[i - 1] + 1]
    found = []
    for start, stop in pairwise((0, *breaks, len(indices)) if indices else ()):
        size, row0 = (stop - start) * tokens, indices[start] * tokens
        packed = slice(start * tokens, start * tokens + size)
        found.append((slice(row0, row0 + size), packed))
    return found


def rows_of(x_BND: Tensor, kept: Tensor | None) -> Tensor:
    """Return the rows of the kept images, images and tokens flat."""
    return (x_BND if kept is None else x_BND.index_select(0, kept)).flatten(0, 1)


def pre_activations(given: BackwardArguments, teacher: int, kept: Tensor | None) -> Tensor:
    """Recompute a teacher's z of the kept rows, block by block of the first Linears."""
    layout, (images, tokens) = given.layout, given.shape
    count = (images if kept is None else len(kept)) * tokens
    z_kK = buffer((count, layout.width_T[teacher]), given.x[0].dtype)
    for rung, x_BND in enumerate(given.x):
        if block := layout.block(rung, teacher):
            weight_HD, bias_H = given.w1[rung][block.rows], given.b1[rung][block.rows]
            out = z_kK[:, block.columns]
            torch.addmm(bias_H, rows_of(x_BND, kept), weight_HD.T, out=out)
    return z_kK
