"""Which optimiser steps are taken: judged on the device, told to the host once per log line.

A step whose loss or gradient is not finite, or whose loss is a spike, changes nothing on any rank:
no weight, moment, average or running statistic. A spike is a loss of the global batch that lies far
above the last W = 64 that were taken, by a robust z-score (Iglewicz and Hoaglin, "How to Detect and
Handle Outliers", 1993):

    z = (loss - median) / (1.4826 median |loss - median| + eps)        eps = 1e-3 |median|

P ranks and K steps since the last log line; the rest as in `tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW, ENOUGH = 64, 10  # losses that a spike is judged by, at most and at least
LOSS, GRADIENT, SPIKE, OWN = 1, 2, 4, 8
"""What a verdict is the sum of: why the step was not taken, and whether this rank's own loss was to
blame; 0 is a step that was taken.
"""
WHY = {LOSS: "loss", SPIKE: "spike", GRADIENT: "gradient"}


class SkippedStep(NamedTuple):
    """A step that was not taken: why, and by whose loss; no ranks where it was nobody's alone."""

    step: int
    why: str
    ranks: tuple[int, ...]


def scores(loss_N: Tensor, window_W: Tensor) -> Tensor:
    """How many robust deviations losses lie above those of the window, whose NaN are not yet there.

    Minus infinity as long as the window has not enough.
    """
    median = window_W.nanmedian()
    deviation = 1.4826 * (window_W - median).abs().nanmedian()
    score_N = (loss_N - median) / (deviation + 1e-3 * median.abs())
    enough = window_W.isfinite().sum() >= ENOUGH
    return torch.where(enough, score_N, -math.inf)


class StepGuard:
    """Judges every optimiser step by what all ranks know, without a host read."""

    def __init__(self, spike: float, *, everyone: Callable[[Tensor], Tensor], device: torch.device):
        """`spike` is the z-score that is too high, 0: none; `everyone` gathers over the ranks."""
        self.spike, self.everyone = spike, everyone
        self.window_W = torch.full((WINDOW,), math.nan, device=device)
        self.streak = 0  # steps not taken in a row, up to the last log line
        self._losses: list[Tensor] = []
        self._verdict: Tensor | None = None
        self._verdicts: list[Tensor] = []

    def see(self, loss: Tensor) -> None:
        """Take note of a micro batch's loss."""
        self._losses.append(loss.detach())

    @torch.no_grad()
    def skip(self, norm: Tensor | float) -> Tensor:
        """1 where the update of this step is to be left out, else 0, on the device.

        `norm` is the gradient's over all ranks. The optimiser asks, after the last micro batch; all
        ranks ask together, and asking again within a step changes nothing.
        """
        if self._verdict is None:
            self._verdict = self._judge(norm)
        return (self._verdict > 0).float()

    @torch.no_grad()
    def close(self) -> Tensor:
        """End an optimiser step; whether it was taken, on the device."""
        # Where the optimiser was not asked, DeepSpeed has refused the gradient before.
        taken = self.skip(math.inf) == 0
        assert self._verdict is not None
        self._verdicts.append(self._verdict)
        self._losses, self._verdict = [], None
        return taken

    def _judge(self, norm: Tensor | float) -> Tensor:
        own = torch.stack(self._losses).float().mean()
        loss_2 = torch.stack([self.everyone(own).mean(), own])
        if not isinstance(norm, Tensor):
            norm = torch.full_like(own, norm)
        lost_2, odd = ~loss_2.isfinite(), ~norm.to(own.device).isfinite()
        spike_2 = scores(loss_2, self.window_W) > (self.spike or math.inf)
        why = LOSS * lost_2[0] + GRADIENT * odd + SPIKE * spike_2[0]
        shifted_W = torch.cat([self.window_W[1:], loss_2[:1]])
        self.window_W = torch.where(why > 0, self.window_W, shifted_W)
        return why + OWN * ((why > 0) & (lost_2 | spike_2)[1])

    def verdicts(self) -> Tensor:
        """This rank's verdict (K) on each step since this was last asked."""
        told_K, self._verdicts = torch.stack(self._verdicts), []
        return told_K

    def hear(self, verdict_PK: Sequence[Sequence[float]], step: int) -> list[SkippedStep]:
        """The steps among the K up to `step` that were not taken, by the verdicts of all ranks."""
        found = []
        first = step - len(verdict_PK[0]) + 1
        for at, verdict_P in enumerate(zip(*verdict_PK, strict=True), first):
            why = int(verdict_P[0]) & ~OWN  # ranks differ in their own share alone
            self.streak = self.streak + 1 if why else 0
            if why:
                ranks = tuple(p for p, verdict in enumerate(verdict_P) if int(verdict) & OWN)
                found.append(SkippedStep(at, next(WHY[bit] for bit in WHY if why & bit), ranks))
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; it is saved at a log line, so no verdict waits to be told."""
        return {"window_W": self.window_W, "streak": torch.tensor(self.streak)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint; what came after it is forgotten."""
        self.window_W = state["window_W"].to(self.window_W.device)
        self.streak = int(state["streak"])
        self._losses, self._verdict, self._verdicts = [], None, []
