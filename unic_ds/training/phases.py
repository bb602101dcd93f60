"""Wrappers of the parts of a training step that set the watchdog's phase when they are called."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

Params = ParamSpec("Params")
Item = TypeVar("Item")
Result = TypeVar("Result")

SetPhase = Callable[[str, int], None]
"""Function of a phase and its optimiser step."""


class Phases:
    """Sets the watchdog's phase when an announced part of the step is called."""

    def __init__(self, set_phase: SetPhase, current_step: Callable[[], int], *, compiles: bool):
        """`compiles`: the first step of a start waits for torch.compile.

        So does the first of each resolution.
        """
        self.set_phase, self.current_step, self.compiles = set_phase, current_step, compiles
        self.first_step = 1
        self.compiling_at: dict[Hashable, int] = {}  # resolution -> its first step in this start

    def restart(self, first_step: int) -> None:
        """Set the first step of a start."""
        self.first_step = first_step

    def enter(self, resolution: Hashable) -> None:
        """Note the sides of the current step's images, for which blocks compile the first time."""
        self.compiling_at.setdefault(resolution, self.current_step())

    def begin(self, phase: str) -> None:
        """Set the phase of the current step; while blocks compile it is `compiling` throughout."""
        step = self.current_step()
        waits = self.compiles and step in (self.first_step, *self.compiling_at.values())
        self.set_phase("compiling" if waits else phase, step)

    def announced(self, phase: str, call: Callable[Params, Result]) -> Callable[Params, Result]:
        """Wrap `call` so that it begins `phase` first."""

        @wraps(call)
        def announce(*args: Params.args, **kwargs: Params.kwargs) -> Result:
            self.begin(phase)
            return call(*args, **kwargs)

        return announce

    def announced_items(self, phase: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items of an endless iterator; asking for each begins `phase`."""
        while True:
            self.begin(phase)
            yield next(items)

    def announce_method(self, owner: object, method: str, phase: str) -> None:
        """Let a method of one object begin `phase` first."""
        setattr(owner, method, self.announced(phase, getattr(owner, method)))
