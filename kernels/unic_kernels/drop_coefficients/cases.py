"""Arguments of `drop_coefficients` for tests, by their sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unic_kernels.drop_coefficients.arguments import Divisor, Unit


@dataclass(frozen=True, kw_only=True)
class Case:
    """Losses by their sizes; `options` are those of `drop_coefficients`."""

    teachers: int
    images: int
    rate: float = 0.5
    keep_hardest: bool = True
    unit: Unit = "image"
    divisor: Divisor = "expected"

    def __str__(self) -> str:
        hardest = "" if self.keep_hardest else " any"
        sizes = f"{self.teachers}x{self.images} p={self.rate}"
        return f"{sizes} {self.unit} {self.divisor}{hardest}"

    @property
    def options(self) -> dict[str, object]:
        return {x: getattr(self, x) for x in ("rate", "keep_hardest", "unit", "divisor")}

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Losses, uniforms and weights."""
        g = torch.Generator().manual_seed(self.teachers * 1000 + self.images)
        loss_TB, uniform_TB = torch.rand(2, self.teachers, self.images, generator=g).to(device)
        if self.unit == "step":
            uniform_TB = uniform_TB[:, :1].expand_as(uniform_TB)
        return loss_TB, uniform_TB, torch.rand(self.teachers, generator=g).to(device) + 0.5


CASES = (
    Case(teachers=1, images=1),
    Case(teachers=4, images=64),
    Case(teachers=4, images=64, divisor="kept"),
    Case(teachers=3, images=300, rate=0.25),
    Case(teachers=3, images=129, unit="step", rate=1.0),
    Case(teachers=5, images=7, unit="step", divisor="kept"),
    Case(teachers=2, images=257, keep_hardest=False),
    Case(teachers=2, images=2, keep_hardest=False, rate=0.99, divisor="kept"),
    Case(teachers=4, images=9, rate=0.0),
    Case(teachers=6, images=33, rate=1.0, divisor="kept"),
)
