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
dropped (teacher, image) pair. The backward looks for such images itself and computes nothing for
them, so its cost is q = (1 + (T - 1)(1 - p)) / T of the dense one, whatever the loss.

z is rounded before GELU, so forward, recomputation and backward see the same numbers. Predictions
come in the type of the inputs, rounded once. `recompute` says what backward finds: "none" keeps z
and h, "hidden" keeps z, "all" keeps neither and repeats the first GEMM for the kept images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from unic_kernels.device import wide
from unic_kernels.ladder import cpu, launch
from unic_kernels.ladder.layout import Layout, layout_of

RECOMPUTE = ("none", "hidden", "all")


def ladder_projection_ref(
    x: Sequence[Tensor],
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b2: Sequence[Tensor],
    layout: Sequence[Sequence[int]],
    *,
    recompute: str = "none",
) -> list[Tensor]:
    """The same by one projector per rung and teacher, summed in fp32; autograd keeps what it needs.

    `recompute` has no effect.
    """
    rungs = Layout(tuple(map(tuple, layout))).rungs
    y: list[Any] = [0] * len(w2)
    for x_BND, weight_HD, bias_H, blocks in zip(x, w1, b1, rungs, strict=True):
        for t, row, column, width in blocks:
            own = slice(row, row + width)
            h_BNH = F.gelu(F.linear(x_BND, weight_HD[own], bias_H[own]))
            y[t] = y[t] + wide(F.linear(h_BNH, w2[t][:, column : column + width]))
    return [(y_BNC + bias_C).to(bias_C.dtype) for y_BNC, bias_C in zip(y, b2, strict=True)]


def _flops(x: list[Any], w1: list[Any], b1: Any, w2: list[Any], *_: Any, **__: Any) -> int:
    """Shapes -> multiplications and additions of the forward's GEMMs."""
    rows = x[0][0] * x[0][1]
    return 2 * rows * sum(shape[0] * shape[1] for shape in (*w1, *w2))


@torch.library.custom_op("unic_kernels::ladder", mutates_args=(), device_types="cpu")
def _ladder(
    x: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    b2: list[Tensor],
    widths: list[int],
    recompute: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Predictions per teacher, and z and h where they are kept."""
    layout = layout_of(widths, len(w2))
    return cpu.forward(x, w1, b1, w2, b2, layout, recompute)


@_ladder.register_fake
def _(
    x: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    b2: list[Tensor],
    widths: list[int],
    recompute: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    images, tokens, _ = x[0].shape
    size = images * tokens * sum(widths)
    y = [x[0].new_empty(images, tokens, len(weight_CK)) for weight_CK in w2]
    z = x[0].new_empty(size if recompute != "all" else 0)
    return y, z, x[0].new_empty(size if recompute == "none" else 0)


@torch.library.custom_op("unic_kernels::ladder_backward", mutates_args=(), device_types="cpu")
def _ladder_backward(
    dy: list[Tensor],
    x: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    z: Tensor,
    h: Tensor,
    widths: list[int],
    recompute: str,
    need_x: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x (an empty list unless needed), w1, b1, w2, b2."""
    dy = [dy_BNC.contiguous() for dy_BNC in dy]  # autograd may expand one number over them
    layout = layout_of(widths, len(w2))
    return cpu.backward(dy, x, w1, b1, w2, z, h, layout, recompute, need_x)


@_ladder_backward.register_fake
def _(
    dy: list[Tensor],
    x: list[Tensor],
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    z: Tensor,
    h: Tensor,
    widths: list[int],
    recompute: str,
    need_x: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    def empty(like: list[Tensor]) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in like]

    db2 = [weight_CK.new_empty(len(weight_CK)) for weight_CK in w2]
    return empty(x if need_x else []), empty(w1), empty(b1), empty(w2), db2


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, w1, b1, w2, _, ctx.widths, ctx.recompute = inputs
    _, z, h = output
    ctx.set_materialize_grads(False)  # z and h get none, and zeros of their size are not free
    ctx.mark_non_differentiable(z, h)
    ctx.counts = [len(x), len(w1), len(b1), len(w2)]
    ctx.save_for_backward(*x, *w1, *b1, *w2, z, h)


def _differentiate(ctx: Any, dy: list[Tensor | None], *unused: Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    x, w1, b1, w2 = ([saved.pop(0) for _ in range(count)] for count in ctx.counts)
    shape = x[0].shape[:2]
    given = [
        w.new_zeros(()).expand(*shape, len(w)) if d is None else d
        for d, w in zip(dy, w2, strict=True)
    ]
    need_x = any(ctx.needs_input_grad[0])
    dx, *rest = _ladder_backward(given, x, w1, b1, w2, *saved, ctx.widths, ctx.recompute, need_x)
    return dx if need_x else [None] * len(x), *rest, None, None


def on_device(
    x: Any, w1: Any, b1: Any, w2: list[Tensor], b2: Any, widths: Any, recompute: Any
) -> Any:
    """Forward by Triton."""
    layout = layout_of(widths, len(w2))
    return launch.forward_triton(x, w1, b1, w2, b2, layout, recompute)


def backward_on_device(dy: list[Tensor], *given: Any) -> Any:
    """Backward by Triton."""
    x, w1, b1, w2, z, h, widths, *options = given
    dy = [dy_BNC.contiguous() for dy_BNC in dy]
    layout = layout_of(widths, len(dy))
    return launch.backward_triton(dy, x, w1, b1, w2, z, h, layout, *options)


_ladder.register_kernel("cuda")(on_device)
_ladder_backward.register_kernel("cuda")(backward_on_device)
register_flop_formula(torch.ops.unic_kernels.ladder)(_flops)
_ladder.register_autograd(_differentiate, setup_context=_save)


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
    """Predictions [B, N, C_t] of every teacher from the rungs' tokens x_l [B, N, D].

    `layout` has the hidden width of each rung and teacher, 0 where there is no projector; `w1[l]`
    stacks the rung's first Linears in the teachers' order, `w2[t]` the teacher's second ones side
    by side in the rungs' order. All tensors share one type. x may be views behind a CLS token.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    _check(x, w1, b1, w2, b2, layout)
    widths = [width for rung in layout for width in rung]
    keeps = recompute if torch.is_grad_enabled() else "all"
    return _ladder(list(x), list(w1), list(b1), list(w2), list(b2), widths, keeps)[0]


def _check(
    x: Sequence[Tensor],
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b2: Sequence[Tensor],
    layout: Sequence[Sequence[int]],
) -> None:
    """ValueError unless the tensors fit one another and the layout."""
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
        _fits(f"x[{rung}]", x[rung], x[0].shape)
        _fits(f"w1[{rung}]", w1[rung], (sum(sizes), width))
        _fits(f"b1[{rung}]", b1[rung], (sum(sizes),))
    for teacher, columns in enumerate(width_T):
        _fits(f"w2[{teacher}]", w2[teacher], (w2[teacher].shape[0], columns))
        _fits(f"b2[{teacher}]", b2[teacher], w2[teacher].shape[:1])
    types = {tensor.dtype for tensor in (*x, *w1, *b1, *w2, *b2)}
    if len(types) > 1:
        raise ValueError(f"all tensors must share one type, got {sorted(map(str, types))}")


def _fits(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")


class Inputs(NamedTuple):
    """Arguments of `ladder_projection`, and a gradient of its results."""

    x: list[Tensor]
    w1: list[Tensor]
    b1: list[Tensor]
    w2: list[Tensor]
    b2: list[Tensor]
    layout: tuple[tuple[int, ...], ...]
    dy: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A ladder's sizes; `keep_TB` says which (teacher, image) pairs have a gradient."""

    name: str
    images: int
    tokens: int
    width: int
    layout: tuple[tuple[int, ...], ...]
    out: tuple[int, ...]
    prefix: int = 1  # tokens in front of those that the ladder reads
    drop: float = 0.5

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """Random arguments at the scale of training; one teacher of each image is always kept."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * std).to(device, dtype)

        sequence = self.prefix + self.tokens
        states = [normal(self.images, sequence, self.width) for _ in self.layout]
        layout = Layout(self.layout)
        rows = [sum(sizes) for sizes in self.layout]
        keep_TB = torch.rand(len(self.out), self.images, generator=generator) >= self.drop
        hardest_B = torch.randint(len(self.out), (self.images,), generator=generator)
        keep_TB.scatter_(0, hardest_B[None], True)
        std1, std2 = self.width**-0.5, sum(layout.width_T) ** -0.5
        return Inputs(
            [state[:, self.prefix :] for state in states],
            [normal(h, self.width, std=std1) for h in rows],
            [normal(h, std=0.1) for h in rows],
            [normal(c, k, std=std2) for c, k in zip(self.out, layout.width_T, strict=True)],
            [normal(c, std=0.1) for c in self.out],
            self.layout,
            [
                normal(self.images, self.tokens, c) * keep_B.to(device, dtype)[:, None, None]
                for c, keep_B in zip(self.out, keep_TB, strict=True)
            ],
        )


def _even(rungs: int, teachers: int, hidden: int, last: int) -> tuple[tuple[int, ...], ...]:
    return ((hidden,) * teachers,) * (rungs - 1) + ((last,) * teachers,)


_B = {"width": 768, "layout": _even(12, 4, 768, 3072), "out": (768,) * 4}
_L = {"width": 1024, "layout": _even(24, 2, 1024, 4096), "out": (1536, 1280), "drop": 0.25}
CASES = (
    Case(name="unic-b-patch", images=64, tokens=196, **_B),  # type: ignore[arg-type]
    Case(name="unic-b-cls", images=64, tokens=1, prefix=0, **_B),  # type: ignore[arg-type]
    Case(name="unic-l-patch", images=32, tokens=256, **_L),  # type: ignore[arg-type]
    Case(name="unic-l-cls", images=32, tokens=1, prefix=0, **_L),  # type: ignore[arg-type]
    Case(
        name="per-teacher-rungs",
        images=16,
        tokens=196,
        width=384,
        layout=((384, 0, 384), (384, 384, 0), (1536, 1536, 768)),
        out=(768, 1024, 384),
    ),
)
