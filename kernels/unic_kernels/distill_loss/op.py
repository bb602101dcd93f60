"""The distillation loss: `image_losses`, balanced and summed.

    loss = sum_tb coefficient_tb loss_tb

with losses of every teacher t and image b, and coefficients that `balance` computes from them
without a gradient, such as `drop_coefficients` (UNIC, arXiv 2408.05088, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from unic_kernels.distill_loss.ref import Balance, Distilled, Refine, balanced
from unic_kernels.image_losses.arguments import Distance, Pair
from unic_kernels.image_losses.op import image_losses


def distill_loss(
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
    """Return the loss of a micro batch: `image_losses` (whose arguments these are) times the
    coefficients of `balance`, summed.

    `refine` may make other losses (T, B) of those, before they are balanced.
    """
    losses = image_losses(pred, target, mean, std, distances=distances, clamp=clamp, eps=eps)
    return balanced(losses, uniform_TB, balance, refine)
