"""The distillation loss in plain torch, and its last step, which needs no kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from unic_kernels.image_losses.arguments import Distance, Pair
from unic_kernels.image_losses.ref import image_losses_ref

Balance = Callable[[Tensor, Tensor], Tensor]
"""Losses and uniforms (T, B) -> coefficients (T, B)."""
Refine = Callable[[Tensor], Tensor]
"""Losses of all entries -> losses per teacher."""


class Distilled(NamedTuple):
    """The loss of a micro batch and its parts; only `loss` and `loss_TB` have gradients."""

    loss: Tensor
    loss_TB: Tensor
    weight_TB: Tensor
    gap_T22: Tensor  # mean over images: teacher, (cls, patch), (cosine, smooth_l1)
    gap_TB22: Tensor  # of each image


def distill_loss_ref(
    pred: Sequence[Pair],
    target: Sequence[Pair],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    uniform_TB: Tensor,
    *,
    distances: Sequence[Distance],
    balance: Balance,
    refine: Refine | None = None,
    clamp: float = 0.0,
    eps: float = 1e-6,
) -> Distilled:
    """Compute what `distill_loss` does."""
    losses = image_losses_ref(pred, target, mean, std, distances=distances, clamp=clamp, eps=eps)
    return balanced(losses, uniform_TB, balance, refine)


def balanced(
    losses: tuple[Tensor, Tensor], uniform_TB: Tensor, balance: Balance, refine: Refine | None
) -> Distilled:
    """Refine, balance and sum losses [T, B]; average gaps [T, B, 2, 2] over images."""
    loss_TB, gap_TB22 = losses
    loss_TB = refine(loss_TB) if refine else loss_TB
    weight_TB = balance(loss_TB.detach(), uniform_TB)
    return Distilled((loss_TB * weight_TB).sum(), loss_TB, weight_TB, gap_TB22.mean(1), gap_TB22)
