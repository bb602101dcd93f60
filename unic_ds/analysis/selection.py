"""Greedy choice of the teachers that explain the others' features best, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unic_ds.analysis.coverage import Coverage, Features


@dataclass(frozen=True, kw_only=True)
class Step:
    """A teacher that was added, and what it led to."""

    teacher: str
    coverage: float
    """Of all teachers that are chosen by then."""
    cost: float
    """Sum over these."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Teachers in the order in which they were chosen, and why others were left out."""

    steps: tuple[Step, ...]
    left_out: dict[str, str]

    @property
    def chosen(self) -> list[str]:
        """Names of the chosen teachers."""
        return [step.teacher for step in self.steps]


def select(
    features: Features, costs: Mapping[str, float], *, budget: float | None = None, seed: int = 0
) -> Selection:
    """Choose teachers by their features (`coverage.Features`) and costs; see `greedy`."""
    return greedy(list(features), Coverage(features, seed=seed).of, costs, budget=budget)


def greedy(
    names: Sequence[str],
    coverage: Callable[[Sequence[str]], float],
    costs: Mapping[str, float],
    *,
    budget: float | None = None,
) -> Selection:
    """At each step, add the teacher that raises the coverage most; of equals the first.

    Those whose cost exceeds what is left of the budget are passed over; None: no budget. ValueError
    if none fits.
    """
    check_budget(costs, budget)
    steps: list[Step] = []
    spent, left = 0.0, list(names)
    while left:
        fitting = [name for name in left if budget is None or spent + costs[name] <= budget]
        if not fitting:
            break
        chosen = [step.teacher for step in steps]
        found = {name: coverage([*chosen, name]) for name in fitting}
        best = max(fitting, key=lambda name: found[name])
        spent += costs[best]
        steps.append(Step(teacher=best, coverage=found[best], cost=spent))
        left.remove(best)
    reasons = {name: reason(costs[name], spent, budget) for name in left}
    return Selection(steps=tuple(steps), left_out=reasons)


def check_budget(costs: Mapping[str, float], budget: float | None) -> None:
    """Raise ValueError for a budget that no teacher fits."""
    cheapest = min(costs, key=lambda name: costs[name])
    if budget is not None and costs[cheapest] > budget:
        raise ValueError(
            f"--budget {budget:g} GFLOPs fits no teacher: the cheapest, {cheapest!r}, costs"
            f" {costs[cheapest]:.4g} an image; raise the budget, or lower its size"
            f" (--teachers.{cheapest}.size)"
        )


def reason(cost: float, spent: float, budget: float | None) -> str:
    """Sentence about a teacher that did not fit."""
    assert budget is not None
    return f"costs {cost:.4g} GFLOPs an image, but {budget - spent:.4g} of {budget:g} are left"
