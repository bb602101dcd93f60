"""Heads of a linear depth probe, of several learning rates at once, and their loss.

A 1x1 convolution maps each patch token, beside the CLS token, to scores of 256 depths; their mean
is the depth (AdaBins with even bins, arXiv 2011.14141; SigLoss, arXiv 2203.14211).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds import rng
from unic_ds.evaluate.dense_head import CropModel, TokenMap, warm_up

STEPS = 38_400
WARM_UP = 12_800
ONLY_MEAN = 100
"""First steps in which the loss has no variance."""
RATES = (1e-4, 3e-4, 1e-3, 5e-3)
DECAY = 0.01
CLIP = 35.0
NEAREST, FARTHEST = 1e-3, 10.0
"""Metres; pixels outside count neither in training nor in the score."""
BINS = 256
EPSILON = 1e-3
"""Metres that are added before the logarithm of the loss."""
MEAN_PART = 0.15
VALUES = 2**26
"""Scores of depths that are held at once: 256 MB, and as much again for each temporary."""


class DepthHeads(nn.Module):
    """Heads of all rates, side by side."""

    centre_K: Tensor

    def __init__(self, width: int, *, seed: int, steps: int):
        """Make heads on tokens of `width` channels, patch and CLS alike."""
        super().__init__()
        generator = torch.Generator().manual_seed(rng.seed_for(seed, "depth head"))
        weight_KC = torch.randn(BINS, 2 * width, generator=generator) * 0.01
        self.weights = nn.ParameterList(weight_KC.clone() for _ in RATES)
        self.biases = nn.ParameterList(torch.zeros(BINS) for _ in RATES)
        self.register_buffer("centre_K", torch.linspace(NEAREST, FARTHEST, BINS))
        pairs = list(zip(self.weights, self.biases, strict=True))
        groups = [{"params": list(pair), "lr": r} for pair, r in zip(pairs, RATES, strict=True)]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, partial(rate_factor, steps=steps)
        )

    def forward(self, tokens: TokenMap) -> Tensor:
        """Scores of the depths (B, R, K, H, W) on the grid of the tokens.

        The convolution is done before the enlargement by 4: both are linear in the tokens.
        """
        assert tokens.cls_BC is not None
        weight_RK_C = torch.cat(list(self.weights))
        patch_RK_C, cls_RK_C = weight_RK_C.split(weight_RK_C.shape[1] // 2, 1)
        bias_B_RK = F.linear(tokens.cls_BC, cls_RK_C, torch.cat(list(self.biases)))
        score_BRKHW = F.conv2d(tokens.map_BCHW, patch_RK_C[:, :, None, None])
        return (score_BRKHW + bias_B_RK[:, :, None, None]).unflatten(1, (len(RATES), BINS))

    def predict(self, tokens: TokenMap, rate: slice) -> Tensor:
        """Depths of some rates."""
        return self.metres(self(tokens)[:, rate])

    def metres(self, score_BRKHW: Tensor) -> Tensor:
        """Depths (B, R, 4H, 4W) on a grid 4 times as fine."""
        some = max(1, VALUES // (16 * score_BRKHW[0].numel()))
        return torch.cat([self._expectation(part) for part in score_BRKHW.split(some)])

    def _expectation(self, score_BRKHW: Tensor) -> Tensor:
        """Mean of the bins' centres, weighted by the enlarged scores."""
        fine_MKHW = F.interpolate(
            score_BRKHW.flatten(0, 1), scale_factor=4, mode="bilinear", align_corners=False
        )
        # weights are relu + 0.1: both sums in one product, their constant part beside it
        moment_2K = torch.stack([self.centre_K, torch.ones_like(self.centre_K)])
        sum_M2HW = torch.einsum("mkhw,nk->mnhw", fine_MKHW.relu_(), moment_2K)
        sum_M2HW = sum_M2HW + 0.1 * moment_2K.sum(1)[:, None, None]
        return (sum_M2HW[:, 0] / sum_M2HW[:, 1]).unflatten(0, score_BRKHW.shape[:2])

    def step(self, grads: Sequence[Tensor]) -> None:
        """Update each head, with its gradient's norm clipped."""
        for parameter, grad in zip(self.parameters(), grads, strict=True):
            parameter.grad = grad
        for pair in zip(self.weights, self.biases, strict=True):
            nn.utils.clip_grad_norm_(pair, CLIP)
        self.optimiser.step()
        self.schedule.step()


def rate_factor(step: int, *, steps: int) -> float:
    """Factor of the rates: linear warm-up, and half a cosine to 0."""
    rise = warm_up(step, steps=round(steps * WARM_UP / STEPS), first=1e-3)
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def only_mean(step: int, *, steps: int) -> bool:
    """True for the first steps, in which the loss has no variance."""
    return step < round(steps * ONLY_MEAN / STEPS)


def checked_width(tokens: TokenMap, name: str) -> int:
    """Width of a model's tokens; ValueError if CLS and patch tokens differ."""
    assert tokens.cls_BC is not None
    width, of_cls = tokens.map_BCHW.shape[1], tokens.cls_BC.shape[1]
    if width != of_cls:
        raise ValueError(f"{name!r} has CLS and patch tokens of {of_cls} and {width} channels")
    return width


class LossSums(NamedTuple):
    """This rank's part of the loss, of which all ranks' sums make the gradient."""

    sum_3R: Tensor
    """fp64 count of pixels, sum and sum of squares of the differences of logarithms, by rate."""
    grads: list[Tensor]
    """Of each parameter: gradients of the last two sums, stacked on a new first axis."""


def loss_sums(heads: DepthHeads, crop: CropModel, tokens: TokenMap, depth_BSS: Tensor) -> LossSums:
    """The sums of SigLoss, some crops at a time; the rates share no parameter."""
    score_BRKHW = heads(tokens)
    some = max(1, VALUES // (16 * score_BRKHW[0].numel()))
    sums, slopes = [], []
    for part_BRKHW, part_BSS in zip(
        score_BRKHW.detach().split(some), depth_BSS.split(some), strict=True
    ):
        leaf_BRKHW = part_BRKHW.requires_grad_()
        pred_BRSS = crop.at_pixels(heads.metres(leaf_BRKHW))
        known_B1SS = known(part_BSS)[:, None]
        # clamped, since the logarithm of an unknown depth must be finite to count as 0
        true_B1SS = part_BSS.clamp(min=NEAREST)[:, None]
        gap_BRSS = ((pred_BRSS + EPSILON).log() - (true_B1SS + EPSILON).log()) * known_B1SS
        sum_2R = torch.stack([x.double().sum((0, 2, 3)) for x in (gap_BRSS, gap_BRSS.square())])
        slopes.append([
            torch.autograd.grad(sum_R.sum(), leaf_BRKHW, retain_graph=last == 0)[0]
            for last, sum_R in enumerate(sum_2R)
        ])  # fmt: skip
        count_1R = known_B1SS.sum().double().expand(1, len(RATES))
        sums.append(torch.cat([count_1R, sum_2R.detach()]))
    parameters = list(heads.parameters())
    both = [
        torch.autograd.grad(score_BRKHW, parameters, torch.cat(found), retain_graph=last == 0)
        for last, found in enumerate(zip(*slopes, strict=True))
    ]
    grads = [torch.stack(pair) for pair in zip(*both, strict=True)]
    return LossSums(torch.stack(sums).sum(0), grads)


def loss_grads(sum_3R: Tensor, grads: Sequence[Tensor], *, only_mean: bool) -> list[Tensor]:
    """Gradients of SigLoss by the sums of all ranks, and the sums' gradients of each parameter."""
    slope_2R = loss_slopes(sum_3R, only_mean=only_mean).float()
    slope_2P = slope_2R.repeat(1, 2)  # of the rates' weights, then of their biases
    return [torch.tensordot(slope_2P[:, at], grad_2x, dims=1) for at, grad_2x in enumerate(grads)]


def loss_slopes(sum_3R: Tensor, *, only_mean: bool) -> Tensor:
    """Derivatives (2, R) of SigLoss by the sum and the sum of squares; 0 without two pixels.

    The loss is sqrt(var g + 0.15 mean(g)^2) over the pixels' g = log(pred) - log(true).
    """
    count_R, known_2R = sum_3R[0], sum_3R[1:].detach().clone().requires_grad_()
    if float(count_R[0]) < 2:
        return torch.zeros_like(known_2R)
    mean_R = known_2R[0] / count_R
    square_R = MEAN_PART * mean_R.square()
    if not only_mean:
        square_R = square_R + (known_2R[1] - known_2R[0] * mean_R) / (count_R - 1)
    loss = square_R.clamp(min=1e-12).sqrt().sum()
    return torch.autograd.grad(loss, known_2R)[0]


def known(depth_HW: Tensor) -> Tensor:
    """Mask of the depths that count."""
    return (depth_HW > NEAREST) & (depth_HW < FARTHEST)
