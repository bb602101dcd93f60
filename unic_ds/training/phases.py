"""The parts of a training step announce their phases to the watchdog, so the loop need not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")

SetPhase = Callable[[str, int], None]
"""Takes a phase and the step that it is of."""


class Phases:
    """Sets the watchdog's phase when an announced part of the step is called."""

    def __init__(self, set_phase: SetPhase, current_step: Callable[[], int], *, compiles: bool):
        """`compiles`: the first step of a start waits for torch.compile."""
        self.set_phase, self.current_step, self.compiles = set_phase, current_step, compiles
        self.first_step = 1

    def restart(self, first_step: int) -> None:
        """Take `first_step` for the first one of a start."""
        self.first_step = first_step

    def begin(self, phase: str) -> None:
        """Set the phase of the current step; while blocks compile it is `compiling` throughout."""
        step = self.current_step()
        waits = self.compiles and step == self.first_step
        self.set_phase("compiling" if waits else phase, step)

    def announced(self, phase: str, call: Callable[Given, Result]) -> Callable[Given, Result]:
        """`call`, which begins `phase` first."""

        @wraps(call)
        def announce(*given: Given.args, **named: Given.kwargs) -> Result:
            self.begin(phase)
            return call(*given, **named)

        return announce

    def announced_items(self, phase: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items of an endless iterator; asking for each begins `phase`."""
        while True:
            self.begin(phase)
            yield next(items)

    def announce_method(self, owner: object, method: str, phase: str) -> None:
        """Let a method of one object begin `phase` first."""
        setattr(owner, method, self.announced(phase, getattr(owner, method)))
