"""AdamW that keeps an exponential moving average of the weights it trains.

After every step `average <- decay * average + (1 - decay) * weight`, from the weights before the
first step. The average is optimiser state, like the two moments: DeepSpeed partitions it as it
partitions the fp32 masters, and saves and loads it with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

KEY = "average"


class AveragedAdamW(torch.optim.AdamW):
    """AdamW whose state holds each weight's average."""

    def __init__(self, groups: list[dict[str, Any]], *, decay: float, **options: Any):
        super().__init__(groups, **options)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of AdamW and of the averages; if `found_inf` is 1 both stay as they are.

        Under ZeRO-1 to 3 DeepSpeed steps one partition at a time, which is then in the groups.
        """
        stepped = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        # AdamW initialises its state if a weight has none at all, so the average is added after it
        starts = {p: p.detach().clone() for p in stepped if KEY not in self.state.get(p, {})}
        loss = super().step(closure)
        for weight, start in starts.items():
            self.state[weight][KEY] = start
        skip: Tensor | None = getattr(self, "found_inf", None)
        rate = 1 - self.decay if skip is None else (1 - self.decay) * (1 - skip)
        for weight in stepped:
            self.state[weight][KEY].lerp_(weight, rate)
        return loss


@contextmanager
@torch.no_grad()
def swapped_in(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context manager that exchanges weights and averages, of the weights that have one."""

    def exchange() -> None:
        for weight, state in optimizer.state.items():
            if KEY in state:
                kept: Tensor = weight.detach().clone()
                weight.copy_(state[KEY])
                state[KEY].copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()
