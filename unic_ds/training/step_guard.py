"""Skips bad optimiser steps by a decision on the device, which the host reads once per log line.

A step whose loss or gradient is not finite, or whose loss is a spike, changes nothing on any rank:
no weight, moment, average or running statistic. A spike is a loss of the global batch far above
those of the last W = 64 steps that were taken, by a robust z-score (Iglewicz and Hoaglin, "How to
Detect and Handle Outliers", 1993):

    z = (loss - median) / (1.4826 median |loss - median| + eps)        eps = 1e-3 |median|

P ranks and K steps since the last log line; the rest as in `tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntFlag
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW, ENOUGH = 64, 10  # losses that a new one is compared with, at most and at least


class Reason(IntFlag):
    """Why a step was skipped; 0 if it was taken."""

    LOSS = 1  # not finite
    GRADIENT = 2  # not finite
    SPIKE = 4
    LOCAL = 8  # this rank's loss was not finite, or a spike


NAMES = {Reason.LOSS: "loss", Reason.SPIKE: "spike", Reason.GRADIENT: "gradient"}
"""The reasons in events.jsonl, which has the first of several."""


class SkippedStep(NamedTuple):
    """A step that was skipped, the reason, and the ranks whose loss caused it, if any."""

    step: int
    why: str
    ranks: tuple[int, ...]


def scores(loss_N: Tensor, window_W: Tensor) -> Tensor:
    """Robust z-scores of losses against those of the window, whose unfilled entries are NaN.

    Minus infinity as long as the window has fewer than `ENOUGH`.
    """
    median = window_W.nanmedian()
    deviation = 1.4826 * (window_W - median).abs().nanmedian()
    score_N = (loss_N - median) / (deviation + 1e-3 * median.abs())
    enough = window_W.isfinite().sum() >= ENOUGH
    return torch.where(enough, score_N, -math.inf)


class StepGuard:
    """Checks every optimiser step by the losses and gradients of all ranks, without a host read."""

    def __init__(
        self, spike: float, *, all_gather_fn: Callable[[Tensor], Tensor], device: torch.device
    ):
        """`spike` is the z-score above which a step is skipped, 0: none.

        `all_gather_fn` stacks a tensor of every rank.
        """
        self.spike, self.all_gather_fn = spike, all_gather_fn
        self.window_W = torch.full((WINDOW,), math.nan, device=device)
        self.streak = 0  # steps skipped in a row, up to the last log line
        self._losses: list[Tensor] = []
        self._reason: Tensor | None = None
        self._reasons: list[Tensor] = []

    def observe(self, loss: Tensor) -> None:
        """Store a micro batch's loss."""
        self._losses.append(loss.detach())

    @torch.no_grad()
    def found_inf(self, norm: Tensor | float) -> Tensor:
        """1 on the device if the optimiser must skip this step, else 0.

        `norm` is the gradient's over all ranks. The optimiser calls it after the last micro batch,
        on all ranks together; further calls within a step change nothing.
        """
        if self._reason is None:
            self._reason = self._decide(norm)
        return (self._reason > 0).float()

    @torch.no_grad()
    def end_step(self) -> Tensor:
        """End an optimiser step; True on the device if it was taken."""
        # If the optimiser did not call `found_inf`, DeepSpeed has rejected the gradient.
        taken = self.found_inf(math.inf) == 0
        assert self._reason is not None
        self._reasons.append(self._reason)
        self._losses, self._reason = [], None
        return taken

    def _decide(self, norm: Tensor | float) -> Tensor:
        local = torch.stack(self._losses).float().mean()
        loss_2 = torch.stack([self.all_gather_fn(local).mean(), local])
        if not isinstance(norm, Tensor):
            norm = torch.full_like(local, norm)
        bad_2, bad_norm = ~loss_2.isfinite(), ~norm.to(local.device).isfinite()
        spike_2 = scores(loss_2, self.window_W) > (self.spike or math.inf)
        reason = Reason.LOSS * bad_2[0] + Reason.GRADIENT * bad_norm + Reason.SPIKE * spike_2[0]
        shifted_W = torch.cat([self.window_W[1:], loss_2[:1]])
        self.window_W = torch.where(reason > 0, self.window_W, shifted_W)
        return reason + Reason.LOCAL * ((reason > 0) & (bad_2 | spike_2)[1])

    def take_reasons(self) -> Tensor:
        """This rank's `Reason` (K) of each step since the last call."""
        reason_K, self._reasons = torch.stack(self._reasons), []
        return reason_K

    def report(self, reason_PK: Sequence[Sequence[float]], step: int) -> list[SkippedStep]:
        """The skipped steps among the K steps up to `step`, by the reasons of all ranks."""
        found = []
        first = step - len(reason_PK[0]) + 1
        for at, reason_P in enumerate(zip(*reason_PK, strict=True), first):
            flags = [Reason(int(reason)) for reason in reason_P]
            shared = flags[0] & ~Reason.LOCAL  # ranks differ in LOCAL alone
            self.streak = self.streak + 1 if shared else 0
            if shared:
                ranks = tuple(p for p, flag in enumerate(flags) if flag & Reason.LOCAL)
                why = next(NAMES[reason] for reason in NAMES if shared & reason)
                found.append(SkippedStep(at, why, ranks))
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Window and streak; a checkpoint is saved at a log line, when no reason is pending."""
        return {"window_W": self.window_W, "streak": torch.tensor(self.streak)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a checkpoint's window and streak, and drop pending losses and reasons."""
        self.window_W = state["window_W"].to(self.window_W.device)
        self.streak = int(state["streak"])
        self._losses, self._reason, self._reasons = [], None, []
