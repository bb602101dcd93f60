"""The distillation loss: distances per (teacher, image), and which of them an image learns from.

Per token: lam_cos (1 - cos) + lam_sl1 smooth_l1 + lam_mse mse; per teacher and image the mean of
the CLS loss and the mean patch loss; the hardest teacher of an image is kept, others are dropped by
chance (method: section 3). Pure functions: tensors in, tensors out, no host read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config
from unic_ds.tokens import Tokens


def token_loss(pred_C: Tensor, target_C: Tensor, cfg: config.Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cosine and smooth-L1 of each token; any leading axes, the last is the channels."""
    cosine = F.cosine_similarity(pred_C, target_C, dim=-1)
    smooth_l1 = F.smooth_l1_loss(pred_C, target_C.expand_as(pred_C), reduction="none").mean(-1)
    total = cfg.cosine * (1 - cosine) + cfg.smooth_l1 * smooth_l1
    if cfg.mse:
        total = total + cfg.mse * (pred_C - target_C).square().mean(-1)
    return total, cosine, smooth_l1


def image_loss(pred: Tokens, target: Tokens, cfg: config.Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """One teacher's loss per image (B), and its mean cosine and smooth-L1 per token kind.

    A leading rung axis in `pred` is averaged: `ladder.combine = each` judges every rung on its own.
    """
    losses, metrics = [], {}
    for kind, pred_C, target_C in zip(("cls", "patch"), pred, target, strict=True):
        loss, cosine, smooth_l1 = token_loss(pred_C.float(), target_C.float(), cfg)
        images = 0 if pred_C.dim() == target_C.dim() else 1
        losses.append(loss.movedim(images, 0).flatten(1).mean(1) if loss.dim() > 1 else loss)
        metrics[f"{kind}_cosine"] = cosine.detach().mean()
        metrics[f"{kind}_smooth_l1"] = smooth_l1.detach().mean()
    return (losses[0] + losses[1]) / 2, metrics


def keep_teachers(loss_TB: Tensor, uniform_TB: Tensor, cfg: config.Drop) -> Tensor:
    """True where an image learns from a teacher: its hardest, and where uniform >= rate."""
    keep_TB = uniform_TB >= cfg.rate
    if cfg.keep_hardest:
        judged_TB = (
            loss_TB.mean(1, keepdim=True).expand_as(loss_TB) if cfg.unit == "step" else loss_TB
        )
        keep_TB = keep_TB.scatter(0, judged_TB.argmax(0, keepdim=True), True)
    return keep_TB


def coefficients(keep_TB: Tensor, cfg: config.Loss, drop: config.Drop) -> Tensor:
    """Weight of each (teacher, image) loss, without gradient: the mask over the divisor.

    `expected`: B (1 + (T - 1)(1 - p)), linear in the images, so ranks and accumulation cannot move
    the answer; `kept`: the number of kept pairs, the authors' choice, which depends on how a batch
    is split.
    """
    teachers, images = keep_TB.shape
    kept_TB = keep_TB.float()
    if cfg.divisor == "kept":
        return kept_TB / kept_TB.sum().clamp(min=1)
    certain = 1 if drop.keep_hardest else 0
    return kept_TB / (images * (certain + (teachers - certain) * (1 - drop.rate)))


def distill_loss(
    pred: dict[str, Tokens],
    target: dict[str, Tokens],
    uniform_TB: Tensor,
    *,
    loss: config.Loss,
    drop: config.Drop,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro batch and its metrics, detached on the device.

    `pred` and `target` are keyed by teacher in config order; `uniform_TB` decides the dropping. The
    loss is a mean over the micro batch's images: average it over ranks and accumulation.
    """
    rows: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for name, prediction in pred.items():
        loss_B, parts = image_loss(prediction, target[name], loss)
        rows.append(loss_B)
        metrics |= {f"{name}/{key}": value for key, value in parts.items()}
    loss_TB = torch.stack(rows)
    keep_TB = keep_teachers(loss_TB.detach(), uniform_TB, drop)
    total = (loss_TB * coefficients(keep_TB, loss, drop)).sum()
    kept_T = keep_TB.float().mean(1)
    metrics |= {f"{name}/kept": kept for name, kept in zip(pred, kept_T, strict=True)}
    return total, {"loss": total.detach()} | metrics
