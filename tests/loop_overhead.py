"""How much the trainer's loop costs beside a bare DeepSpeed loop: `loop_overhead.py OPTIONS`.

In one real run, what a bare loop would do too (read a batch, run teachers and student, judge,
backward, step) is timed apart from the whole; the rest is ours. One process, on a CPU, where a
call returns when its work is done. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from unic_ds import entry, loss, parts, train

bare_s: dict[str, float] = {}
"""Seconds of what a bare loop does too, by part."""


def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, its seconds added to a part of the bare loop."""

    def calling(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            bare_s[name] = bare_s.get(name, 0.0) + time.perf_counter() - begun

    return calling


class Timed:
    """An object whose calls, and methods of these names, count as the bare loop's."""

    def __init__(self, whole: Any, **names: str):
        self._whole, self._names = whole, names

    def __call__(self, *given: Any, **named: Any) -> Any:
        return timed(self._names["call"], self._whole)(*given, **named)

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Any:
        return timed("reading", self._whole.__next__)()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._whole, name)
        return timed(self._names[name], found) if name in self._names else found


def watched(build: Callable[..., Any]) -> Callable[..., Any]:
    """`parts.build`, whose stream, teachers and engine are timed."""

    def building(task: Any) -> Any:
        made = build(task)
        made.stream = Timed(made.stream)
        made.teachers = Timed(made.teachers, call="teachers")
        made.engine = Timed(made.engine, call="student", backward="backward", step="step")
        return made

    return building


def steps_timed(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`optim.apply`, with which a step begins, noting when and what was bare by then."""

    def applying(*given: Any) -> Any:
        marks.append((time.perf_counter(), sum(bare_s.values())))
        return apply(*given)

    return applying


marks: list[tuple[float, float]] = []


if __name__ == "__main__":
    parts.build = watched(parts.build)
    loss.distill_loss = timed("loss", loss.distill_loss)
    train.optim.apply = steps_timed(train.optim.apply)
    entry.run(train.main, sys.argv[1:])
    settled = marks[3:]  # the first steps allocate
    whole = settled[-1][0] - settled[0][0]
    bare = settled[-1][1] - settled[0][1]
    steps = len(settled) - 1
    print(
        json.dumps(
            {
                "steps": steps,
                "ms_a_step": round(1e3 * whole / steps, 2),
                "overhead": round(whole / bare - 1, 5),
            }
        )
    )
