"""Errors of the image losses and their gradients against fp64, beside those of eager torch."""

from __future__ import annotations

import torch
from torch import Tensor

from unic_kernels.image_losses import image_losses, image_losses_ref
from unic_kernels.image_losses.cases import Case, Example


def run(op, case: Case, given: Example) -> list[Tensor | None]:
    """Losses, gaps and gradients of the predictions."""
    loss_TB, gap_TB22 = op(
        given.pred,
        given.target,
        given.mean,
        given.std,
        distances=case.distances,
        clamp=case.clamp,
    )
    grad_TB = given.grad_TB.to(loss_TB.dtype)
    return [
        loss_TB.detach(),
        gap_TB22,
        *torch.autograd.grad(loss_TB, given.leaves(), grad_TB, allow_unused=True),
    ]


def doubled(given: Example) -> Example:
    """The same numbers in fp64."""

    def pairs(side):
        return [tuple(x.detach().double().requires_grad_() for x in pair) for pair in side]

    mean, std = ([x.double() for x in side] for side in (given.mean, given.std))
    return Example(pairs(given.pred), pairs(given.target), mean, std, given.grad_TB.double())


def worst(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def near_the_truth(case: Case, given: Example) -> None:
    """The criterion: at most twice as far from the truth as eager torch is in the same type."""
    truth = run(image_losses_ref, case, doubled(given))
    eager = run(image_losses_ref, case, given)
    found = run(image_losses, case, given)
    assert [x is None for x in found] == [x is None for x in truth]
    for got, plain, true in zip(found, eager, truth, strict=True):
        if true is not None:
            assert got.dtype == plain.dtype and got.shape == true.shape
            assert worst(got, true) <= 2 * worst(plain, true) + 1e-6
