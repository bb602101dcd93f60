"""Actions of rank 0 beside training: they take a small share of its time, and end no run."""

from __future__ import annotations

import time
from collections.abc import Callable

from unic_ds import dist
from unic_ds.training.attempts import Attempts

SHARE = 0.02
"""The most of a run's time that an action may take, since all ranks wait for rank 0."""


class SideAction:
    """An action of rank 0 that a run can go without. A failure is said once."""

    def __init__(self, action: Callable[[], object], *, name: str, instead: str):
        """`name` is what a failure leaves out, `instead` a clause with the command to use then."""
        self.action = action
        self.attempts = Attempts(f"no {name}", f"; the run goes on without, and {instead}")
        self.next_time = 0.0

    @property
    def failed(self) -> bool:
        """True if the action has failed, once or more."""
        return self.attempts.noted

    def run(self, *, last: bool = False) -> bool:
        """Act, unless the last time took too long for that; the `last` at any rate. True if done.

        Only rank 0 acts.
        """
        begun = time.monotonic()
        if dist.rank() != 0 or (begun < self.next_time and not last):
            return False
        done = self.attempts.here(self.action)
        now = time.monotonic()
        self.next_time = now + (now - begun) / SHARE
        return done
