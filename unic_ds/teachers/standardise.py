"""Per-channel standardisation of a teacher's tokens (method: section 1).

    y = (x - mean) / (std + eps)        with the statistics from before the step
    mean <- (1 - m) mean + m mean_batch
    std  <- (1 - m) std  + m (std_batch + eps)        std_batch unbiased, over the global batch

What ranks and micro batches exchange is count, mean and M2 (the sum of squared deviations) per
channel, merged in fp64 by the many-part form of Chan et al., "Updating formulae and a pairwise
algorithm for computing sample variances" (1979). So the statistics do not depend on how a batch was
split. Statistics that are fitted before training are one such step with m = 1 over many batches.

Shapes: P parts to merge (micro batches or ranks), S = 3 statistics, 2 token kinds; the rest as in
`tokens`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unic_ds import config
from unic_ds.tokens import Tokens

EPS = 1e-6


def measure(x_BN_C: Tensor) -> Tensor:
    """Count, mean and M2 of each channel as fp64 [3, C].

    Two passes in fp32; the second also finds what rounding took from the mean, which would
    otherwise pass for a difference between parts when the mean is large against the spread.
    """
    x_BN_C = x_BN_C.float()
    mean_C = x_BN_C.mean(0)
    rest_BN_C = x_BN_C - mean_C
    lost_C = rest_BN_C.mean(0).double()
    m2_C = rest_BN_C.square().sum(0).double() - len(x_BN_C) * lost_C.square()
    return torch.stack([torch.full_like(lost_C, len(x_BN_C)), mean_C + lost_C, m2_C.clamp(min=0)])


def merge(moments_PS2C: Tensor) -> Tensor:
    """The statistics [3, 2, C] of the union of P parts; a part of count 0 adds nothing."""
    count_P2C, mean_P2C, m2_P2C = moments_PS2C.unbind(1)
    total_2C = count_P2C.sum(0)
    mean_2C = (count_P2C * mean_P2C).sum(0) / total_2C.clamp(min=1)
    between_2C = (count_P2C * (mean_P2C - mean_2C).square()).sum(0)
    return torch.stack([total_2C, mean_2C, m2_P2C.sum(0) + between_2C])


class Standardiser(nn.Module):
    """Statistics of one teacher with `width` channels; kind 0 is cls, kind 1 is patch."""

    mean_2C: Tensor
    std_2C: Tensor
    moments_S2C: Tensor

    def __init__(self, width: int, cfg: config.Standardise):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("mean_2C", torch.zeros(2, width))
        self.register_buffer("std_2C", torch.ones(2, width))
        # Empty at every checkpoint: a step that was saved was tracked.
        self.register_buffer(
            "moments_S2C", torch.zeros(3, 2, width, dtype=torch.float64), persistent=False
        )

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> Tokens:
        """Standardised fp32 targets; a channel that hardly varies is floored, the rest clamped."""
        if not self.cfg.on:
            return Tokens(tokens.cls_BC.float(), tokens.patch_BNC.float())
        return Tokens(self.scale(tokens.cls_BC, 0), self.scale(tokens.patch_BNC, 1))

    def scale(self, x_C: Tensor, kind: int) -> Tensor:
        """The target of raw features, clamped; over the last axis, whatever stands before it."""
        y_C, clamp = self.normalise(x_C, kind), self.cfg.target_clamp
        return y_C.clamp(-clamp, clamp) if clamp > 0 else y_C

    def normalise(self, x_C: Tensor, kind: int) -> Tensor:
        """(x - mean) / (std + eps) over the last axis."""
        return (x_C.float() - self.mean_2C[kind]) / self.divisor(kind)

    def invert(self, y_C: Tensor, kind: int) -> Tensor:
        """The features that `normalise` made `y_C` of."""
        return y_C * self.divisor(kind) + self.mean_2C[kind]

    def divisor(self, kind: int) -> Tensor:
        """Each channel's std + eps, floored."""
        std_C = self.std_2C[kind]
        if self.cfg.std_floor > 0:
            std_C = std_C.maximum(self.cfg.std_floor * std_C.median())
        return std_C + EPS

    @torch.no_grad()
    def observe(self, tokens: Tokens) -> None:
        """Add a micro batch of raw tokens to this rank's share of the step; no host sync."""
        if self.cfg.on:
            batch_S2C = torch.stack(
                [measure(tokens.cls_BC), measure(tokens.patch_BNC.flatten(0, 1))], 1
            )
            self.moments_S2C.copy_(merge(torch.stack([self.moments_S2C, batch_S2C])))

    def moments(self) -> Tensor:
        """This rank's count, mean and M2 since the last `track`: fp64 [3, 2, C]."""
        return self.moments_S2C.clone()

    @torch.no_grad()
    def track(self, moments_PS2C: Tensor, momentum: float) -> None:
        """Move the running statistics by the moments of all ranks; once per optimiser step.

        A step whose features are not finite leaves them alone: its update is skipped, and one such
        batch would poison every later target.
        """
        count_2C, mean_2C, m2_2C = merge(moments_PS2C).unbind(0)
        std_2C = (m2_2C / (count_2C - 1).clamp(min=1)).sqrt() + EPS
        usable = torch.isfinite(mean_2C).all() & torch.isfinite(std_2C).all() & (count_2C > 0).all()
        for running_2C, batch_2C in ((self.mean_2C, mean_2C), (self.std_2C, std_2C)):
            moved_2C = (1 - momentum) * running_2C + momentum * batch_2C.float()
            running_2C.copy_(torch.where(usable, moved_2C, running_2C))
        self.moments_S2C.zero_()

    def fit(self, moments_PS2C: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Fix the statistics by what all ranks observed; `total` sums a tensor over the ranks.

        ValueError where the features are not finite.
        """
        if not torch.isfinite(moments_PS2C).all():
            raise ValueError(
                "its features are not finite in the batches that its statistics are fitted to; try"
                " --teachers.NAME.precision fp32"
            )
        self.track(moments_PS2C, 1.0)
