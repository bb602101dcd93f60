"""The distillation loss: distances between predictions and targets per (teacher, image), balanced.

Per token a weighted sum of terms (method: section 3): cosine `1 - cos`, smooth_l1 (beta 1), mse,
and for CLS tokens contrastive: InfoNCE of an image's prediction against the targets of all images
(Tian et al., CRD, arXiv 1910.10699, with the batch as negatives). Per teacher and image the mean of
the CLS loss and the mean patch loss. Pure functions: tensors in, tensors out, no host read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config
from unic_ds.balance import Balancer
from unic_ds.tokens import Tokens

Everyone = Callable[[Tensor], tuple[Tensor, int]]
"""CLS targets of this rank -> those of all ranks in rank order, and where this rank's begin."""


def alone(target_BC: Tensor) -> tuple[Tensor, int]:
    """`Everyone` of a process that has no others."""
    return target_BC, 0


def token_loss(
    pred_C: Tensor, target_C: Tensor, terms: Mapping[str, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, cosine and smooth-L1 of each token; the last axis is the channels."""
    cosine = F.cosine_similarity(pred_C, target_C, dim=-1)
    smooth_l1 = F.smooth_l1_loss(pred_C, target_C.expand_as(pred_C), reduction="none").mean(-1)
    total = terms.get("cosine", 0) * (1 - cosine) + terms.get("smooth_l1", 0) * smooth_l1
    if "mse" in terms:
        total = total + terms["mse"] * (pred_C - target_C).square().mean(-1)
    return total, cosine, smooth_l1


def contrastive(
    pred_BC: Tensor, target_BC: Tensor, temperature: float, everyone: Everyone
) -> Tensor:
    """InfoNCE per image: -log softmax over all images' targets of cos / temperature.

    `pred_BC` may have leading axes. Negatives are the images that ran together: this micro batch's
    on every rank.
    """
    all_NC, first = everyone(target_BC)
    logits_BN = F.normalize(pred_BC, dim=-1) @ F.normalize(all_NC, dim=-1).T / temperature
    own_BB = logits_BN.log_softmax(-1)[..., first : first + len(target_BC)]
    return -own_BB.diagonal(dim1=-2, dim2=-1)


def image_loss(
    pred: Tokens,
    target: Tokens,
    distance: config.Distance,
    *,
    temperature: float = 0.07,
    everyone: Everyone = alone,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One teacher's loss per image (B), and its mean cosine and smooth-L1 per token kind.

    A leading rung axis in `pred` is averaged: `ladder.combine = each` judges every rung on its own.
    A kind without terms is not looked at.
    """
    losses, metrics = [], {}
    for kind, terms, pred_C, target_C in zip(distance._fields, distance, pred, target, strict=True):
        if not terms:
            continue
        pred_C = pred_C.float()
        loss, cosine, smooth_l1 = token_loss(pred_C, target_C, terms)
        if "contrastive" in terms:
            gap_B = contrastive(pred_C, target_C, temperature, everyone)
            loss = loss + terms["contrastive"] * gap_B
        images = 0 if pred_C.dim() == target_C.dim() else 1
        losses.append(loss.movedim(images, 0).flatten(1).mean(1) if loss.dim() > 1 else loss)
        metrics[f"{kind}_cosine"] = cosine.detach().mean()
        metrics[f"{kind}_smooth_l1"] = smooth_l1.detach().mean()
    return torch.stack(losses).mean(0), metrics


def distill_loss(
    pred: Mapping[str, Tokens],
    target: Mapping[str, Tokens],
    uniform_TB: Tensor,
    *,
    loss: config.Loss,
    balance: Balancer,
    distances: Mapping[str, config.Distance] | None = None,
    everyone: Everyone = alone,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro batch and its metrics, detached on the device.

    `pred` and `target` are keyed by teacher in config order; `uniform_TB` decides the dropping;
    `distances` are those of teachers that differ from `loss`. The loss is a mean over the micro
    batch's images: average it over ranks and accumulation.
    """
    rows: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for name, prediction in pred.items():
        distance = (distances or {}).get(name, loss.distance)
        loss_B, parts = image_loss(
            prediction,
            target[name],
            distance,
            temperature=loss.temperature,
            everyone=everyone,
        )
        rows.append(loss_B)
        metrics |= {f"{name}/{key}": value for key, value in parts.items()}
    loss_TB = torch.stack(rows)
    weight_TB = balance(loss_TB, uniform_TB)
    total = (loss_TB * weight_TB).sum()
    kept_T, weight_T = (weight_TB > 0).float().mean(1), weight_TB.sum(1)
    for name, kept, weight in zip(pred, kept_T, weight_T, strict=True):
        metrics |= {f"{name}/kept": kept, f"{name}/weight": weight}
    return total, {"loss": total.detach()} | metrics
