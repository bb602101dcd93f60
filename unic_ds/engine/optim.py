"""Parameter groups, and schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Any, Protocol

from timm.models import group_parameters
from torch import nn

from unic_ds import config


def warmup_cosine(i: int, *, steps: int, peak: float, end: float, warmup: int = 0) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then a cosine to `end`; `i` counts from 0."""
    if i < warmup:
        return peak * i / max(warmup - 1, 1)
    progress = (i - warmup) / max(steps - warmup, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(step: int, cfg: config.Optim, images: int) -> float:
    """The rate of optimiser step `step` (from 1) over `images` training images."""
    return warmup_cosine(
        step - 1,
        steps=cfg.step_count(images),
        peak=cfg.peak,
        end=min(cfg.lr_end, cfg.peak),
        warmup=cfg.warmup_steps(images),
    )


def momentum(step: int, cfg: config.Standardise, steps: int) -> float:
    """The momentum of the targets' statistics at step `step` (from 1); 0 once they are frozen.

    Statistics that will be frozen have the same cosine over the steps before that.
    """
    if cfg.freeze_after and step > cfg.freeze_after:
        return 0.0
    horizon = min(cfg.freeze_after or steps, steps)
    return warmup_cosine(step - 1, steps=horizon, peak=1.0, end=cfg.momentum_end)


def groups(
    module: nn.Module, weight_decay: float, *, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay (biases and 1-D tensors); timm's rule.

    With a `layer_decay` below 1 each layer of `module.encoder` has two groups, with its scale.
    timm's functions would take tensors that ZeRO-3 has partitioned for 1-D tensors.
    """
    scales = layer_scales(module.encoder, layer_decay) if layer_decay < 1 else {}
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            found.setdefault((scales.get(name, 1.0), decayed), []).append(parameter)
    return [
        {"params": found[key], "weight_decay": weight_decay * key[1], "lr_scale": key[0]}
        for key in sorted(found)
    ]


def layer_scales(encoder: Any, decay: float) -> dict[str, float]:
    """Learning-rate scale by parameter of `encoder.`: 1 in the last block, times `decay` a layer.

    Layers are timm's: the embeddings, then each block (after BEiT, arXiv 2106.08254).
    """
    layer = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    top = max(layer.values())
    return {f"encoder.{name}": decay ** (top - i) for name, i in layer.items()}


class ParamGroups(Protocol):
    """An optimiser, or DeepSpeed's wrapper of one."""

    param_groups: list[dict[str, Any]]


def apply(optimizer: ParamGroups, rate: float) -> None:
    """Set the learning rate of every group, by its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
