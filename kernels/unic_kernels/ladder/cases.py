"""Arguments of the ladder for tests, by their sizes; `CASES` are those of real runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unic_kernels.ladder.arguments import BackwardArguments, ForwardArguments
from unic_kernels.ladder.layout import Layout


class Inputs(NamedTuple):
    """Arguments of `ladder_projection`, and a gradient of its results."""

    x: list[Tensor]
    w1: list[Tensor]
    b1: list[Tensor]
    w2: list[Tensor]
    b2: list[Tensor]
    layout: tuple[tuple[int, ...], ...]
    dy: list[Tensor]

    def forward_arguments(self, recompute: str) -> ForwardArguments:
        """Return the forward op's arguments."""
        widths = [width for rung in self.layout for width in rung]
        return ForwardArguments(self.x, self.w1, self.b1, self.w2, self.b2, widths, recompute)

    def backward_arguments(
        self, z: Tensor, h: Tensor, recompute: str, *, need_x: bool = True
    ) -> BackwardArguments:
        """Return the backward op's arguments, given what forward kept."""
        x, w1, b1, w2, _, widths, _ = self.forward_arguments(recompute)
        return BackwardArguments(self.dy, x, w1, b1, w2, z, h, widths, recompute, need_x)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A ladder's sizes; a share `drop` of (teacher, image) pairs has no gradient."""

    name: str
    images: int
    tokens: int
    width: int
    layout: tuple[tuple[int, ...], ...]
    out: tuple[int, ...]
    prefix: int = 1  # tokens in front of those that the ladder reads
    drop: float = 0.5

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """Return random arguments at the scale of training; one teacher of each image is kept."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * std).to(device, dtype)

        sequence = self.prefix + self.tokens
        states = [normal(self.images, sequence, self.width) for _ in self.layout]
        layout = Layout(self.layout)
        rows = [sum(sizes) for sizes in self.layout]
        keep_TB = torch.rand(len(self.out), self.images, generator=generator) >= self.drop
        hardest_B = torch.randint(len(self.out), (self.images,), generator=generator)
        keep_TB.scatter_(0, hardest_B[None], True)
        std1, std2 = self.width**-0.5, sum(layout.width_T) ** -0.5
        return Inputs(
            [state[:, self.prefix :] for state in states],
            [normal(h, self.width, std=std1) for h in rows],
            [normal(h, std=0.1) for h in rows],
            [normal(c, k, std=std2) for c, k in zip(self.out, layout.width_T, strict=True)],
            [normal(c, std=0.1) for c in self.out],
            self.layout,
            [
                normal(self.images, self.tokens, c) * keep_B.to(device, dtype)[:, None, None]
                for c, keep_B in zip(self.out, keep_TB, strict=True)
            ],
        )


def _even(rungs: int, teachers: int, hidden: int, last: int) -> tuple[tuple[int, ...], ...]:
    return ((hidden,) * teachers,) * (rungs - 1) + ((last,) * teachers,)


_B = {"width": 768, "layout": _even(12, 4, 768, 3072), "out": (768,) * 4}
_L = {"width": 1024, "layout": _even(24, 2, 1024, 4096), "out": (1536, 1280), "drop": 0.25}
CASES = (
    Case(name="unic-b-patch", images=64, tokens=196, **_B),  # type: ignore[arg-type]
    Case(name="unic-b-cls", images=64, tokens=1, prefix=0, **_B),  # type: ignore[arg-type]
    Case(name="unic-l-patch", images=32, tokens=256, **_L),  # type: ignore[arg-type]
    Case(name="unic-l-cls", images=32, tokens=1, prefix=0, **_L),  # type: ignore[arg-type]
    Case(
        name="per-teacher-rungs",
        images=16,
        tokens=196,
        width=384,
        layout=((384, 0, 384), (384, 384, 0), (1536, 1536, 768)),
        out=(768, 1024, 384),
    ),
)
