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
"""Rows [B, ...] of this rank -> (those of all ranks in rank order, offset of this rank's)."""


def no_dispersion(target_BC: Tensor) -> Tensor:
    """Dispersion 1, for losses without a run."""
    return target_BC.new_ones(())


class Context(NamedTuple):
    """Inputs of a term besides a token and its target."""

    temperature: float  # loss.temperature
    all_gather_fn: AllGather
    dispersion: Callable[[Tensor], Tensor] = no_dispersion  # of the teacher's CLS targets


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


def angle(a_BC: Tensor, b_BC: Tensor) -> Tensor:
    """Angle between vectors, in radians; unlike acos it is exact, and has a slope, everywhere."""
    a_BC, b_BC = (F.normalize(x_BC, dim=-1, eps=1e-6) for x_BC in (a_BC, b_BC))
    return 2 * torch.atan2((a_BC - b_BC).norm(dim=-1), (a_BC + b_BC).norm(dim=-1))


def dispersion(pred_BC: Tensor, target_BC: Tensor, context: Context) -> Tensor:
    """Squared angle over the teacher's mean squared angle to its mean direction.

    So a teacher whose targets lie in a narrow cone is not drowned by one with wide ones (Ranzinger
    et al., C-RADIOv4, arXiv 2601.17237).
    """
    return angle(pred_BC, target_BC).square() / context.dispersion(target_BC)


def relational(pred_BC: Tensor, target_BC: Tensor, context: Context) -> Tensor:
    """One-sided squared gap between the similarities of images, of predictions and of targets.

    Of the images that ran together, on all ranks, those more similar to an image than the median
    (by the targets' cosine) may not be less similar by the predictions', and the others not more:

        mean_j relu(T_ij - S_ij)^2 if T_ij >= median_j T_ij, else relu(S_ij - T_ij)^2

    After the asymmetric relational loss of Chaybouti et al., AMoE (SigLino), arXiv 2512.20157. The
    predictions of the other images have no gradient.
    """
    target_NC, first = context.all_gather_fn(target_BC)
    pred_NC, _ = context.all_gather_fn(pred_BC.detach().movedim(-2, 0))
    pred_CN = F.normalize(pred_NC, dim=-1).movedim(0, -1)
    pred_BN = F.normalize(pred_BC, dim=-1) @ pred_CN
    target_BN = F.normalize(target_BC, dim=-1) @ F.normalize(target_NC, dim=-1).T
    image_N = torch.arange(len(target_NC), device=target_BC.device)
    own_BN = image_N == image_N[first : first + len(target_BC), None]
    others = len(target_NC) - 1
    median_B = target_BN.masked_fill(own_BN, torch.inf).sort(-1).values[:, (others - 1) // 2]
    gap_BN = torch.where(target_BN >= median_B[:, None], target_BN - pred_BN, pred_BN - target_BN)
    return gap_BN.relu().square().masked_fill(own_BN, 0.0).sum(-1) / max(others, 1)


TERMS: dict[str, Term] = {
    "cosine": cosine,
    "smooth_l1": smooth_l1,
    "mse": mse,
    "contrastive": contrastive,
    "dispersion": dispersion,
    "relational": relational,
}
