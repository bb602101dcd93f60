"""`image_losses` in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_kernels.dtype import upcast
from unic_kernels.image_losses.arguments import TERMS, Distance, Pair


def image_losses_ref(
    pred: Sequence[Pair],
    target: Sequence[Pair],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    *,
    distances: Sequence[Distance],
    clamp: float = 0.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Compute what `image_losses` does, term by term."""
    losses, gaps = [], []
    for tokens, raw, mean_2C, std_2C, distance in zip(
        pred, target, mean, std, distances, strict=True
    ):
        kinds = []
        gap_22B = mean_2C.new_zeros(2, 2, len(raw[0]))
        for kind, terms in enumerate(distance):
            if not terms:
                continue
            p_BC, x_BC = upcast(tokens[kind]), upcast(raw[kind])
            t_BC = (x_BC - mean_2C[kind]) / (std_2C[kind] + eps)
            t_BC = t_BC.clamp(-clamp, clamp) if clamp else t_BC
            cosine_B = F.cosine_similarity(p_BC, t_BC, dim=-1)
            smooth_l1_B = F.smooth_l1_loss(p_BC, t_BC, reduction="none").mean(-1)
            mse_B = F.mse_loss(p_BC, t_BC, reduction="none").mean(-1)
            found = zip(TERMS, (1 - cosine_B, smooth_l1_B, mse_B), strict=True)
            weighted = torch.stack([terms.get(name, 0.0) * value_B for name, value_B in found])
            kinds.append(weighted.sum(0).reshape(len(p_BC), -1).mean(1))
            for i, value_B in enumerate((cosine_B, smooth_l1_B)):
                gap_22B[kind, i] = value_B.detach().reshape(len(value_B), -1).mean(1)
        losses.append(torch.stack(kinds).mean(0))
        gaps.append(gap_22B.movedim(2, 0))
    return torch.stack(losses), torch.stack(gaps)
