"""Ladder of projectors of one kind of token: all rungs and teachers, as few large GEMMs.

    z_lt = x_l W1_lt^T + b1_lt         rounded to the activations' type
    h_lt = z_lt Phi(z_lt)              GELU, by erf
    y_t  = sum_l h_lt W2_lt^T + b2_t   the sum over rungs is the K dimension of one GEMM

The first Linears of all teachers on a rung are one GEMM, and so are the second Linears of all rungs
of a teacher: no rung's own projection exists, and the sum is taken in fp32. Backward, with
dh_t = dy_t W2_t and dz = dh gelu'(z):

    dW2_t = dy_t^T h_t    db2_t = sum dy_t    dW1_l = dz_l^T x_l    db1_l = sum dz_l
    dx_l  = sum_t dz_lt W1_lt

Teacher dropping (UNIC, arXiv 2408.05088, section 3.3) leaves dy_t exactly zero on every token of a
dropped (teacher, image) pair. The backward finds such images itself and computes nothing for
them, so its cost is q = (1 + (T - 1)(1 - p)) / T of the dense one, whatever the loss.

z is rounded before GELU, so forward, recomputation and backward see the same numbers. Predictions
come in the type of the inputs, rounded once. `recompute` is the activation recomputation: "none"
keeps z and h, "hidden" keeps z and recomputes GELU, "all" keeps neither and repeats the first GEMM
for the kept images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from unic_kernels import custom_op
from unic_kernels.ladder import cpu, launch
from unic_kernels.ladder.arguments import (
    RECOMPUTE,
    BackwardArguments,
    ForwardArguments,
    Gradients,
    Results,
)


def ladder_projection(
    x: Sequence[Tensor],
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b2: Sequence[Tensor],
    layout: Sequence[Sequence[int]],
    *,
    recompute: str = "none",
) -> list[Tensor]:
    """Return predictions [B, N, C_t] of every teacher from the rungs' tokens x_l [B, N, D].

    `layout` has the hidden width of each rung and teacher, 0 if there is no projector; `w1[l]`
    stacks the rung's first Linears in the teachers' order, `w2[t]` the teacher's second ones side
    by side in the rungs' order. All tensors share one type. x may be views behind a CLS token.
    ValueError if the tensors do not fit one another, or `recompute` is none of `RECOMPUTE`.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    widths = [width for rung in layout for width in rung]
    keeps = recompute if torch.is_grad_enabled() else "all"
    given = ForwardArguments(list(x), list(w1), list(b1), list(w2), list(b2), widths, keeps)
    check(given, layout)
    y, _, _ = FORWARD(*given)
    return y


def check(given: ForwardArguments, layout: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless the tensors fit one another and the layout."""
    x, w1, b1, w2, b2, _, _ = given
    width_T = [sum(column) for column in zip(*layout, strict=True)]
    rungs, teachers = len(layout), len(width_T)
    counts = (len(x), len(w1), len(b1), len(w2), len(b2))
    if not rungs or counts != (rungs, rungs, rungs, teachers, teachers):
        raise ValueError(
            f"a layout of {rungs} rungs and {teachers} teachers wants as many x, w1, b1 and as many"
            f" w2, b2; got {counts}"
        )
    if not all(width_T):
        raise ValueError(f"teacher {width_T.index(0)} has no projector on any rung")
    if x[0].ndim != 3:
        raise ValueError(f"x must be [images, tokens, width], got {tuple(x[0].shape)}")
    width = x[0].shape[2]
    for rung, sizes in enumerate(layout):
        check_shape(f"x[{rung}]", x[rung], x[0].shape)
        check_shape(f"w1[{rung}]", w1[rung], (sum(sizes), width))
        check_shape(f"b1[{rung}]", b1[rung], (sum(sizes),))
    for teacher, columns in enumerate(width_T):
        check_shape(f"w2[{teacher}]", w2[teacher], (w2[teacher].shape[0], columns))
        check_shape(f"b2[{teacher}]", b2[teacher], w2[teacher].shape[:1])
    types = {tensor.dtype for tensor in (*x, *w1, *b1, *w2, *b2)}
    if len(types) > 1:
        raise ValueError(f"all tensors must share one type, got {sorted(map(str, types))}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless a tensor has a shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")


def fake_forward(given: ForwardArguments) -> Results:
    """Return empty tensors of the shapes that forward returns."""
    x, size = given.x[0], given.shape.numel() * given.layout.total
    y = [x.new_empty(*given.shape, len(weight_CK)) for weight_CK in given.w2]
    z = x.new_empty(size if given.recompute != "all" else 0)
    return y, z, x.new_empty(size if given.recompute == "none" else 0)


def fake_backward(given: BackwardArguments) -> Gradients:
    """Return empty tensors of the shapes that backward returns."""

    def empty(like: list[Tensor]) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in like]

    db2 = [weight_CK.new_empty(len(weight_CK)) for weight_CK in given.w2]
    dx = empty(given.x if given.need_x else [])
    return Gradients(dx, empty(given.w1), empty(given.b1), empty(given.w2), db2)


FORWARD = custom_op.define(
    "ladder",
    ForwardArguments,
    "(Tensor[], Tensor, Tensor)",
    cpu=cpu.forward,
    cuda=launch.forward,
    fake=fake_forward,
)
BACKWARD = custom_op.define(
    "ladder_backward",
    BackwardArguments,
    "(Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    cpu=cpu.backward,
    cuda=launch.backward,
    fake=fake_backward,
)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    """Keep what backward reads: inputs and weights, z and h."""
    given, (_, z, h) = ForwardArguments(*inputs), output
    ctx.set_materialize_grads(False)  # z and h get none, and zeros of their size are not free
    ctx.mark_non_differentiable(z, h)
    ctx.widths, ctx.recompute = given.widths, given.recompute
    groups = (given.x, given.w1, given.b1, given.w2)
    ctx.counts = [len(group) for group in groups]
    ctx.save_for_backward(*(tensor for group in groups for tensor in group), z, h)


def differentiate(ctx: Any, dy: list[Tensor | None], *unused: Tensor) -> tuple[Any, ...]:
    """Return the gradients of the forward op's arguments, in their order."""
    saved = list(ctx.saved_tensors)
    x, w1, b1, w2 = ([saved.pop(0) for _ in range(count)] for count in ctx.counts)
    z, h = saved
    shape = x[0].shape[:2]
    dy_or_zeros = [
        w.new_zeros(()).expand(*shape, len(w)) if d is None else d
        for d, w in zip(dy, w2, strict=True)
    ]
    need_x = any(ctx.needs_input_grad[0])
    given = BackwardArguments(dy_or_zeros, x, w1, b1, w2, z, h, ctx.widths, ctx.recompute, need_x)
    grads = Gradients(*BACKWARD(*given))
    dx = grads.dx if need_x else [None] * len(x)
    return dx, grads.dw1, grads.db1, grads.dw2, grads.db2, None, None


FORWARD.register_autograd(differentiate, setup_context=save_for_backward)


@register_flop_formula(torch.ops.unic_kernels.ladder)
def flops(x: list[Any], w1: list[Any], b1: Any, w2: list[Any], *_: Any, **__: Any) -> int:
    """Return the multiplications and additions of the forward's GEMMs, given shapes."""
    rows = x[0][0] * x[0][1]
    return 2 * rows * sum(shape[0] * shape[1] for shape in (*w1, *w2))
