"""Base class of balancers, which weigh the teachers of each image."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unic_ds import config


class Balancer(nn.Module):
    """Balancer with constant weights (`none`, `fixed`); base class of the others.

    A subclass overrides `share` (or `forward`), `track` if it learns from the losses, and
    `from_config` if its constructor takes more than the weights. Its buffers are checkpointed.
    """

    compares_gradients: ClassVar[bool] = False
    """True if `compare` is to be called."""

    weight_T: Tensor

    def __init__(self, weight_T: Tensor):
        super().__init__()
        self.register_buffer("weight_T", weight_T / weight_T.mean(), persistent=False)

    @classmethod
    def from_config(cls, cfg: config.Config) -> Self:
        """Balancer of a run's teachers."""
        return cls(teacher_weights(cfg))

    @torch.no_grad()
    def forward(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        """Coefficients (T, B) of a micro batch's losses; `uniform_TB` is noise in [0, 1).

        It is -1 for pairs that are not seen, whose losses are -inf.
        """
        return self.weight_T[:, None] * self.share(loss_TB.detach(), uniform_TB)

    def share(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        """Coefficients before the teachers' weights."""
        return torch.full_like(loss_TB, 1 / loss_TB.numel())

    def choose_pairs(self, step: int, uniform_TB: NDArray[np.float64]) -> NDArray[np.bool_] | None:
        """Pairs of a micro batch that `step` computes, chosen before the teachers run.

        `uniform_TB` is negative for pairs that are not seen, which may not be chosen. None: all
        others. Else `forward` gets the pairs, as 1 and 0, in place of the uniforms.
        """
        return None

    def metrics(self, loss_TB: Tensor) -> dict[str, Tensor]:
        """Logged values of a micro batch's losses [T, B], in each step under the same names."""
        return {}

    def track(self, taken: Tensor | None = None) -> None:
        """Update running state at the end of an optimiser step, unless `taken` is false.

        Every rank calls it.
        """

    def compare(self, gram_TT: Tensor, images: int) -> None:
        """Learn from inner products of the teachers' gradients, summed over a micro batch."""


def teacher_weights(cfg: config.Config) -> Tensor:
    """Weights [T] of a run's teachers, in config order."""
    return torch.tensor([row.weight for row in cfg.teachers])
