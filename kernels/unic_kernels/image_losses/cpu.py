"""The algebra of `image_losses` in torch, for CPU tensors: some images at a time, in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_kernels.dtype import upcast
from unic_kernels.image_losses.arguments import (
    MIN_NORM,
    BackwardArguments,
    ForwardArguments,
    Pair,
    Results,
)

VALUES_IN_CACHE = 2**18
"""Values of a tensor that a core's cache holds beside those of a few others."""


def learned_kinds(given: ForwardArguments) -> Iterator[tuple[int, int, list[float]]]:
    """Yield teacher, kind and weights of the terms of everything that is learned."""
    for i, learned in enumerate(given.learned):
        if learned:
            yield *divmod(i, 2), given.weight[3 * i : 3 * i + 3]


def split_images(given: ForwardArguments, teacher: int, image_B: Tensor) -> Sequence[Tensor]:
    """Split `image_B` so that what passes between operations on a part stays in the cache."""
    values = max(1, given.extent[2]) * given.mean[teacher].shape[1]
    return image_B.split(max(1, VALUES_IN_CACHE // max(1, values)))


def tokens_of(given: ForwardArguments, teacher: int, kind: int, image_B: Tensor) -> Pair:
    """Return predictions and standardised targets [B, n, C] of some images."""
    i = 2 * teacher + kind
    p_BnC, x_BnC = (upcast(side[i][image_B]) for side in (given.pred, given.target))
    if not kind:
        p_BnC, x_BnC = p_BnC[:, None], x_BnC[:, None]
    t_BnC = (x_BnC - given.mean[teacher][kind]) / (given.std[teacher][kind] + given.eps)
    return p_BnC, t_BnC.clamp_(-given.clamp, given.clamp)


def forward(given: ForwardArguments) -> Results:
    """Return losses, gaps and row statistics, as the kernels do."""
    loss_TB, gap_TB22, stat_TBR3 = (x.zero_() for x in given.empty_results())
    every_B = torch.arange(given.extent[1])
    for teacher, kind, (w_cosine, w_smooth_l1, w_mse) in learned_kinds(given):
        for image in split_images(given, teacher, every_B):
            p_BnC, t_BnC = tokens_of(given, teacher, kind, image)
            pairs = ((p_BnC, t_BnC), (p_BnC, p_BnC), (t_BnC, t_BnC))
            pt_Bn, pp_Bn, tt_Bn = dots = [(a * b).sum(2) for a, b in pairs]
            stat_TBR3[teacher, image, kind : kind + pt_Bn.shape[1]] = torch.stack(dots, 2)
            p_norm_Bn, t_norm_Bn = (x.sqrt().clamp(min=MIN_NORM) for x in (pp_Bn, tt_Bn))
            cosine_Bn = pt_Bn / (p_norm_Bn * t_norm_Bn)
            smooth_l1_Bn = F.smooth_l1_loss(p_BnC, t_BnC, reduction="none").mean(2)
            loss_Bn = w_cosine * (1 - cosine_Bn) + w_smooth_l1 * smooth_l1_Bn
            if w_mse:
                loss_Bn += w_mse * F.mse_loss(p_BnC, t_BnC, reduction="none").mean(2)
            loss_TB[teacher, image] += loss_Bn.sum(1)
            gap_TB22[teacher, image, kind] = torch.stack([cosine_Bn, smooth_l1_Bn], 2).mean(1)
    return loss_TB, gap_TB22, stat_TBR3


def backward(both: BackwardArguments) -> list[Tensor]:
    """Return gradients of the kinds that are learned, of images whose gradient is not 0."""
    given, stat_TBR3, grad_TB = both.forward, both.stat_TBR3, both.grad_TB
    grads = [x.zero_() for x in given.empty_grads()]
    for grad, (teacher, kind, weights) in zip(grads, learned_kinds(given), strict=True):
        for image in split_images(given, teacher, grad_TB[teacher].nonzero().squeeze(1)):
            p_BnC, t_BnC = tokens_of(given, teacher, kind, image)
            stat_Bn3 = stat_TBR3[teacher, image, kind : kind + p_BnC.shape[1]]
            g_B11 = grad_TB[teacher, image, None, None]
            value_BnC = g_B11 * derivative(p_BnC, t_BnC, stat_Bn3, weights)
            grad[image] = value_BnC.view(len(image), *grad.shape[1:]).to(grad.dtype)
    return grads


def derivative(p_BnC: Tensor, t_BnC: Tensor, stat_Bn3: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the derivative of the weighted terms by the predictions."""
    w_cosine, w_smooth_l1, w_mse = weights
    pt_Bn, pp_Bn, tt_Bn = stat_Bn3.unbind(2)
    norm_Bn, floored_Bn = pp_Bn.sqrt(), pp_Bn.sqrt().clamp(min=MIN_NORM)
    by_t_Bn = 1 / (floored_Bn * tt_Bn.sqrt().clamp(min=MIN_NORM))
    by_p_Bn = (pt_Bn * by_t_Bn / (floored_Bn * norm_Bn)).masked_fill(norm_Bn == 0, 0)
    found_BnC = (w_cosine * by_p_Bn)[..., None] * p_BnC - (w_cosine * by_t_Bn)[..., None] * t_BnC
    if w_smooth_l1 or w_mse:
        d_BnC = p_BnC - t_BnC
        found_BnC.add_(d_BnC.clamp(-1, 1), alpha=w_smooth_l1 / p_BnC.shape[2])
        found_BnC.add_(d_BnC, alpha=2 * w_mse / p_BnC.shape[2])
    return found_BnC
