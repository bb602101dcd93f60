"""Arguments of the ladder's custom ops; their schemas are derived from these fields."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unic_kernels.ladder.layout import Layout, layout_of

RECOMPUTE = ("none", "hidden", "all")
"""Activation recomputation: keep z and h; keep z and recompute GELU; keep neither."""

Results = tuple[list[Tensor], Tensor, Tensor]
"""Predictions y [B, N, C_t] per teacher; flat buffers z and h, empty unless they are kept."""


class ForwardArguments(NamedTuple):
    """Arguments of the forward op. L rungs, T teachers; all tensors share one type."""

    x: list[Tensor]  # L times [B, N, D]
    w1: list[Tensor]  # L times [sum_t H_lt, D]
    b1: list[Tensor]  # L times [sum_t H_lt]
    w2: list[Tensor]  # T times [C_t, K_t], K_t = sum_l H_lt
    b2: list[Tensor]  # T times [C_t]
    widths: list[int]  # H_lt, rung after rung
    recompute: str

    @property
    def layout(self) -> Layout:
        return layout_of(self.widths, len(self.w2))

    @property
    def shape(self) -> torch.Size:
        """B, N."""
        return self.x[0].shape[:2]


class BackwardArguments(NamedTuple):
    """Arguments of the backward op: gradients of the predictions, inputs, what forward kept."""

    dy: list[Tensor]  # T times [B, N, C_t]
    x: list[Tensor]
    w1: list[Tensor]
    b1: list[Tensor]
    w2: list[Tensor]
    z: Tensor
    h: Tensor
    widths: list[int]
    recompute: str
    need_x: bool

    @property
    def layout(self) -> Layout:
        return layout_of(self.widths, len(self.w2))

    @property
    def shape(self) -> torch.Size:
        """B, N."""
        return self.x[0].shape[:2]


class Gradients(NamedTuple):
    """Results of the backward op, which returns them as a plain tuple."""

    dx: list[Tensor]  # empty unless `need_x`
    dw1: list[Tensor]
    db1: list[Tensor]
    dw2: list[Tensor]
    db2: list[Tensor]
