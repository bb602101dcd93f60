"""Stochastic depth with given decisions, in place of timm's DropPath."""

from __future__ import annotations

from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth whose decisions are given, so that ranks, restarts and recomputation agree.

    timm's DropPath draws from each rank's generator. `scale_B` is 0 (dropped) or 1 / (1 - rate) per
    image.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.scale_B: Tensor | None = None

    def forward(self, x_BND: Tensor) -> Tensor:
        if not self.training or self.scale_B is None:
            return x_BND
        return x_BND * self.scale_B.to(x_BND.dtype).view(-1, 1, 1)


def give_drop_paths(encoder: nn.Module) -> list[DropPath]:
    """Replace timm's DropPath modules by ours, in the order that the branches run."""
    paths = []
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, TimmDropPath):
                paths.append(DropPath(child.drop_prob or 0.0))
                setattr(parent, name, paths[-1])
    return paths
