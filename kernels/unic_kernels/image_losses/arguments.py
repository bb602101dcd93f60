"""Arguments of the custom ops of `image_losses`; their schemas are derived from these fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

TERMS = ("cosine", "smooth_l1", "mse")
MIN_NORM = 1e-8
"""The least norm that a cosine divides by, torch's default."""

Pair = tuple[Tensor, Tensor]
"""CLS tokens [B, C] and patch tokens [B, N, C] of one model; a kind that is not learned: any."""
Distance = tuple[Mapping[str, float], Mapping[str, float]]
"""Weights of the terms of cls and of patch tokens; none: the kind is not learned."""

Results = tuple[Tensor, Tensor, Tensor]
"""Losses [T, B]; cosine and smooth_l1 of both kinds [T, B, 2, 2]; row statistics [T, B, R, 3]."""


class ForwardArguments(NamedTuple):
    """Arguments of the forward op: two entries per teacher, cls and patch; one of mean and std."""

    pred: list[Tensor]
    target: list[Tensor]
    mean: list[Tensor]
    std: list[Tensor]
    weight: list[float]  # six per teacher: `TERMS` of cls, of patch, over tokens and kinds
    learned: list[bool]  # per teacher and kind
    clamp: float
    eps: float

    @property
    def extent(self) -> tuple[int, int, int]:
        """T, B, N; N is 0 if no patch tokens are learned."""
        learned = [x for x, taken in zip(self.pred, self.learned, strict=True) if taken]
        patches = [x.shape[1] for x in learned if x.dim() == 3]
        return len(self.mean), len(learned[0]), patches[0] if patches else 0

    def empty_results(self) -> Results:
        """Return memory for the results."""
        teachers, images, patches = self.extent
        like = self.mean[0]
        return (
            like.new_empty(teachers, images),
            like.new_empty(teachers, images, 2, 2),
            like.new_empty(teachers, images, 1 + patches, 3),
        )

    def empty_grads(self) -> list[Tensor]:
        """Return memory for the gradients of the kinds that are learned."""
        pairs = zip(self.pred, self.learned, strict=True)
        return [x.new_empty(x.shape) for x, taken in pairs if taken]


class BackwardArguments(NamedTuple):
    """Arguments of the backward op: those of forward, its row statistics, the losses' gradient."""

    pred: list[Tensor]
    target: list[Tensor]
    mean: list[Tensor]
    std: list[Tensor]
    weight: list[float]
    learned: list[bool]
    clamp: float
    eps: float
    stat_TBR3: Tensor
    grad_TB: Tensor

    @property
    def forward(self) -> ForwardArguments:
        return ForwardArguments(
            self.pred,
            self.target,
            self.mean,
            self.std,
            self.weight,
            self.learned,
            self.clamp,
            self.eps,
        )
