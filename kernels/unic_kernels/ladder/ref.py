"""The ladder in plain torch: one projector per rung and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from unic_kernels.dtype import upcast
from unic_kernels.ladder.layout import Layout


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
    """Compute what `ladder_projection` does by a projector per rung and teacher, summed in fp32.

    Autograd keeps what it needs, so `recompute` has no effect.
    """
    rungs = Layout(tuple(map(tuple, layout))).rungs
    y: list[Any] = [0] * len(w2)
    for x_BND, weight_HD, bias_H, blocks in zip(x, w1, b1, rungs, strict=True):
        for block in blocks:
            h_BNH = F.gelu(F.linear(x_BND, weight_HD[block.rows], bias_H[block.rows]))
            y_BNC = F.linear(h_BNH, w2[block.teacher][:, block.columns])
            y[block.teacher] = y[block.teacher] + upcast(y_BNC)
    return [(y_BNC + bias_C).to(bias_C.dtype) for y_BNC, bias_C in zip(y, b2, strict=True)]
