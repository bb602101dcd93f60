"""Terms of the distillation loss, in plain torch: distances between a prediction and its target.

A term is a function `(pred, target, context) -> loss` of one kind of token: CLS tokens [..., B, C]
and [B, C] give [..., B], patch tokens [..., B, N, C] and [B, N, C] give [..., B, N]. `pred` is fp32
and may have a leading axis of ladder rungs; `target` is fp32, standardised and clamped. To add a
term, give its function a name in `TERMS`: that name can then stand in `--loss.cls`, `--loss.patch`
and a teacher's own losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

AllGather = Callable[[Tensor], tuple[Tensor, int]]
"""CLS targets of this rank -> (those of all ranks in rank order, offset of this rank's)."""


class Context(NamedTuple):
    """Inputs of a term besides a token and its target."""

    temperature: float  # loss.temperature
    all_gather_fn: AllGather


Term = Callable[[Tensor, Tensor, Context], Tensor]
"""Prediction [..., C], target [..., C] and context -> loss [...] of each token."""


def cosine(pred_BNC: Tensor, target_BNC: Tensor, _: Context) -> Tensor:
    """1 - cosine similarity."""
    return 1 - F.cosine_similarity(pred_BNC, target_BNC, dim=-1)


def smooth_l1(pred_BNC: Tensor, target_BNC: Tensor, _: Context) -> Tensor:
    """Smooth L1 distance (beta 1), averaged over channels."""
    gap_BNC = pred_BNC - target_BNC
    return F.smooth_l1_loss(gap_BNC, torch.zeros_like(gap_BNC), reduction="none").mean(-1)


def mse(pred_BNC: Tensor, target_BNC: Tensor, _: Context) -> Tensor:
    """Squared distance, averaged over channels."""
    return (pred_BNC - target_BNC).square().mean(-1)


def contrastive(pred_BC: Tensor, target_BC: Tensor, context: Context) -> Tensor:
    """InfoNCE of an image's CLS prediction against the CLS targets of all images.

    -log softmax over images of cos / temperature. Negatives are the images that ran together: this
    micro batch's on every rank (Tian et al., CRD, arXiv 1910.10699, with the batch as negatives).
    """
    all_NC, first = context.all_gather_fn(target_BC)
    cosine_BN = F.normalize(pred_BC, dim=-1) @ F.normalize(all_NC, dim=-1).T
    logits_BN = cosine_BN / context.temperature
    log_prob_BB = logits_BN.log_softmax(-1)[..., first : first + len(target_BC)]
    return -log_prob_BB.diagonal(dim1=-2, dim2=-1)


TERMS: dict[str, Term] = {
    "cosine": cosine,
    "smooth_l1": smooth_l1,
    "mse": mse,
    "contrastive": contrastive,
}
