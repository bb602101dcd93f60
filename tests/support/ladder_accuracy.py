"""Cases of the ladder op, and errors of its predictions and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unic_kernels.ladder.cases import Case, Inputs

UNEVEN = ((5, 0, 7), (6, 6, 0), (0, 24, 12))
"""Teachers absent from rungs, widths that differ within one."""

SMALL = [
    Case(name="even", images=5, tokens=9, width=24, layout=((16, 16), (48, 48)), out=(20, 33)),
    Case(name="uneven", images=6, tokens=7, width=12, layout=UNEVEN, out=(8, 10, 9)),
    Case(name="cls", images=7, tokens=1, width=20, layout=((8,) * 4, (32,) * 4), out=(12,) * 4),
    Case(name="one", images=1, tokens=3, width=8, layout=((8,),), out=(4,), prefix=0),
    Case(name="kept", images=3, tokens=4, width=8, layout=((8, 8),) * 3, out=(6, 6), drop=0),
    Case(name="hardest", images=9, tokens=5, width=8, layout=((8,) * 4,), out=(6,) * 4, drop=1),
    Case(name="none", images=0, tokens=4, width=8, layout=((8, 8),), out=(6, 6)),
]


def gradients(op: Callable[..., list[Tensor]], inputs: Inputs, **options: str) -> list[Tensor]:
    """Predictions, then gradients of x, w1, b1, w2, b2."""
    x, w1, b1, w2, b2, layout, dy = inputs
    leaves = [t.detach().requires_grad_() for group in (x, w1, b1, w2, b2) for t in group]
    rest = list(leaves)
    groups = [[rest.pop(0) for _ in group] for group in (x, w1, b1, w2, b2)]
    y = op(*groups, layout, **options)
    torch.autograd.backward(y, dy)
    return [*(t.detach() for t in y), *(t.grad for t in leaves if t.grad is not None)]


def double(inputs: Inputs) -> Inputs:
    groups = ([t.double() for t in group] for group in (*inputs[:5], inputs.dy))
    x, w1, b1, w2, b2, dy = groups
    return Inputs(x, w1, b1, w2, b2, inputs.layout, dy)


def error(values: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    pairs = zip(values, truth, strict=True)
    return [(v.double() - t).abs().max().item() if t.numel() else 0.0 for v, t in pairs]
