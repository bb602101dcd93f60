"""Arguments of `image_losses` for tests and benchmarks, by their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unic_kernels.image_losses.arguments import Distance, Pair

BOTH = {"cosine": 0.5, "smooth_l1": 0.5}
ALL = {"cosine": 0.9, "smooth_l1": 0.1, "mse": 0.3}


class Example(NamedTuple):
    """Arguments of `image_losses`, and the gradient that comes back."""

    pred: list[Pair]
    target: list[Pair]
    mean: list[Tensor]
    std: list[Tensor]
    grad_TB: Tensor

    def leaves(self) -> list[Tensor]:
        return [x for pair in self.pred for x in pair]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch by its sizes; `kept` is the share of (teacher, image) pairs with a gradient."""

    name: str
    images: int = 3
    patches: int = 5
    widths: tuple[int, ...] = (96,)
    distances: tuple[Distance, ...] = ((BOTH, BOTH),)
    clamp: float = 10.0
    kept: float = 0.6
    strided: bool = False  # patch tokens are x[:, 1:] of a longer sequence

    def __str__(self) -> str:
        return self.name

    def make(
        self, dtype: torch.dtype, device: str = "cpu", raw: torch.dtype | None = None
    ) -> Example:
        """Random tokens whose channels differ in mean and spread; predictions want gradients."""
        g = torch.Generator().manual_seed(len(self.name))

        def tokens(width: int, kind: torch.dtype, spread: float) -> Pair:
            scale_C = torch.rand(width, generator=g) * spread + 0.2
            x_BNC = torch.randn(self.images, 1 + self.patches, width, generator=g) * scale_C
            x_BNC = (x_BNC + scale_C.flip(0) * spread).to(device, kind)
            return x_BNC[:, 0], x_BNC[:, 1:] if self.strided else x_BNC[:, 1:].contiguous()

        high = torch.promote_types(dtype, torch.float32)
        pred = [tokens(width, dtype, 0.0) for width in self.widths]
        target = [tokens(width, raw or dtype, 3.0) for width in self.widths]
        mean = [torch.rand(2, w, generator=g).to(device, high) * 3 for w in self.widths]
        std = [torch.rand(2, w, generator=g).to(device, high) + 0.3 for w in self.widths]
        shape = (len(self.widths), self.images)
        kept_TB = torch.rand(shape, generator=g) < self.kept
        grad_TB = (torch.rand(shape, generator=g) * kept_TB).to(device, high)
        for pair in pred:
            for x in pair:
                x.requires_grad_()
        return Example(pred, target, mean, std, grad_TB)


CASES = (
    Case(name="one image", images=1, patches=1, kept=1.0),
    Case(name="odd", images=5, patches=19, widths=(200,), distances=((ALL, ALL),)),
    Case(name="no clamp", clamp=0.0, widths=(257,)),
    Case(name="patch only", distances=(({}, ALL),), patches=8),
    Case(name="cls only", distances=((BOTH, {}),)),
    Case(name="weight 0", distances=(({"cosine": 0.0}, {"mse": 1.0}),)),
    Case(
        name="four teachers",
        patches=9,
        widths=(96, 200, 64, 300),
        distances=((BOTH, BOTH), ({}, ALL), (ALL, BOTH), ({"cosine": 1.0}, {})),
        strided=True,
    ),
    Case(name="all dropped", kept=0.0),
    Case(name="all kept", kept=1.1, strided=True, widths=(96, 40), distances=((BOTH, ALL),) * 2),
)
