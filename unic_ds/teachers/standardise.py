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
from unic_ds.tokens import Target, Tokens
from unic_kernels.ops import FUSED, Ops

EPS = 1e-6


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

    def __init__(self, width: int, cfg: config.Standardise, ops: Ops = FUSED):
        super().__init__()
        self.cfg, self.ops = cfg, ops
        self.register_buffer("mean_2C", torch.zeros(2, width))
        self.register_buffer("std_2C", torch.ones(2, width))
        # Empty at every checkpoint: a step that was saved was tracked.
        self.register_buffer(
            "moments_S2C", torch.zeros(3, 2, width, dtype=torch.float64), persistent=False
        )

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> Target:
        """Target of these tokens by the current statistics."""
        if not self.cfg.on:
            return Target.of(tokens)
        return Target(tokens, self.mean_2C.clone(), self.divisor(), self.cfg.target_clamp)

    def divisor(self) -> Tensor:
        """Each channel's std + eps [2, C], not below the floor."""
        std_2C = self.std_2C
        if self.cfg.std_floor > 0:
            floor_21 = self.cfg.std_floor * std_2C.median(1, keepdim=True).values
            std_2C = std_2C.maximum(floor_21)
        return std_2C + EPS

    @torch.no_grad()
    def undo(self, tokens: Tokens) -> Tokens:
        """fp32 features of standardised tokens, the inverse of `forward` except for its clamp.

        A kind of token that is empty, since it is not learned, stays empty.
        """
        if not self.cfg.on:
            return Tokens(*(y_C.float() for y_C in tokens))
        kinds = (
            self.undo_kind(y_C.float(), i) if len(y_C) else y_C for i, y_C in enumerate(tokens)
        )
        return Tokens(*kinds)

    def undo_kind(self, y_C: Tensor, kind: int) -> Tensor:
        """Features of standardised tokens of one kind (0: cls, 1: patch)."""
        return y_C * self.divisor()[kind] + self.mean_2C[kind]

    @torch.no_grad()
    def observe(self, tokens: Tokens) -> None:
        """Add a micro batch of features to this rank's moments; no host sync."""
        if self.cfg.on:
            batch_S2C = torch.stack([self.ops.moments(x_C) for x_C in tokens], 1)
            self.moments_S2C.copy_(merge(torch.stack([self.moments_S2C, batch_S2C])))

    def moments(self) -> Tensor:
        """This rank's count, mean and M2 since the last `track`: fp64 [3, 2, C]."""
        return self.moments_S2C.clone()

    @torch.no_grad()
    def track(self, moments_PS2C: Tensor, momentum: float, taken: Tensor | None = None) -> None:
        """Move the running statistics by the moments of all ranks; once per optimiser step.

        They do not change if the step was not taken, has fewer than two tokens of a kind, or has
        features that are not finite: one such batch would spoil every later target.
        """
        count_2C, mean_2C, m2_2C = merge(moments_PS2C).unbind(0)
        std_2C = (m2_2C / (count_2C - 1).clamp(min=1)).sqrt() + EPS
        usable = torch.isfinite(mean_2C).all() & torch.isfinite(std_2C).all() & (count_2C > 1).all()
        usable = usable if taken is None else usable & taken
        for running_2C, batch_2C in ((self.mean_2C, mean_2C), (self.std_2C, std_2C)):
            moved_2C = (1 - momentum) * running_2C + momentum * batch_2C.float()
            running_2C.copy_(torch.where(usable, moved_2C, running_2C))
        self.moments_S2C.zero_()

    def fit(self, moments_PS2C: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Fix the statistics by the moments of all ranks; `total` sums a tensor over the ranks.

        ValueError if the features are not finite.
        """
        if not torch.isfinite(moments_PS2C).all():
            raise ValueError(
                "its features are not finite in the batches that its statistics are fitted to; try"
                " --teachers.NAME.precision fp32"
            )
        self.track(moments_PS2C, 1.0)
