"""Arguments of `moments` for tests and benchmarks, by their sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows by their sizes; `offset` is the means' size against spreads of about 1."""

    shape: tuple[int, ...]
    offset: float = 1.0
    strided: bool = False  # x[:, 1:] of a longer sequence

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{sizes} {self.offset:g}{' strided' if self.strided else ''}"

    def make(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Random rows whose channels differ in mean and spread."""
        g = torch.Generator().manual_seed(sum(self.shape))
        *rows, width = self.shape
        rows[-1] += self.strided
        scale_C = torch.rand(width, generator=g) + 0.5
        x = torch.randn(*rows, width, generator=g) * scale_C + self.offset * scale_C.flip(0)
        x = x.to(device, dtype)
        return x[:, 1:] if self.strided else x


CASES = (
    Case(shape=(1, 96)),
    Case(shape=(127, 200)),
    Case(shape=(257, 130), offset=1e3),
    Case(shape=(2500, 16), offset=1e4),
    Case(shape=(3, 19, 200), strided=True),
    Case(shape=(2, 300, 40), strided=True, offset=100.0),
    Case(shape=(0, 24)),
)
