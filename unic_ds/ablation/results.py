"""Results of a grid: means and deviations over seeds, differences seed by seed, ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from unic_ds.ablation import evaluations
from unic_ds.ablation.cells import Study
from unic_ds.ablation.child import last_error
from unic_ds.evaluate import comparison
from unic_ds.evaluate.comparison import Better, Comparison, Row, null_if_not_finite
from unic_ds.files import write_atomic

FILE = "ablation.json"

BySeed = Mapping[int, float]
"""Seed -> value."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (divisor N - 1) of the finite values."""

    mean: float
    std: float | None
    """None for one value."""
    count: int

    def plain(self) -> dict[str, float | int | None]:
        """As JSON."""
        return {"mean": self.mean, "std": self.std, "seeds": self.count}


def spread(values: BySeed) -> Spread | None:
    """The spread of values; None if none is finite."""
    found = finite(values)
    if not found:
        return None
    return Spread(mean(found), stdev(found) if len(found) > 1 else None, len(found))


def finite(values: BySeed) -> list[float]:
    """The values that are finite."""
    return [value for value in values.values() if math.isfinite(value)]


@dataclass
class Measure:
    """A measure of all cells and teachers over the seeds."""

    name: str
    unit: str
    better: Better
    rows: dict[int, Row] = field(default_factory=dict)
    """By seed; a row has the values of cells and teachers."""
    teachers: Sequence[str] = ()

    def values(self, model: str) -> dict[int, float]:
        """The values of a cell or teacher."""
        return {s: row.values[model] for s, row in self.rows.items() if model in row.values}

    def complete(self, cell: str) -> bool:
        """True if a cell has a finite value of every seed, so that its mean can be compared."""
        found = spread(self.values(cell))
        return found is not None and found.count == len(self.rows)

    def means(self, cells: Sequence[str]) -> dict[str, float]:
        """The means of the cells that are complete: all are over the same seeds."""
        return {cell: mean(self.values(cell).values()) for cell in cells if self.complete(cell)}

    def best(self, cells: Sequence[str]) -> list[str]:
        """The complete cells with the best mean; none unless several can be compared."""
        means = self.means(cells)
        return Row(self.name, self.unit, self.better, means).best() if len(means) > 1 else []

    def gains(self, cell: str) -> dict[int, float]:
        """The cell's value minus its best teacher's of the same seed; positive is better."""
        roles: dict[str, comparison.Role] = dict.fromkeys(self.teachers, "teacher")
        found = {seed: row.gain(cell, roles) for seed, row in self.rows.items()}
        return {seed: gain for seed, gain in found.items() if gain is not None}

    def differences(self, cell: str, other: str) -> dict[int, float]:
        """The cell's value minus another's of the same seed; positive is better.

        Of a measure by which models are not ranked: positive is larger.
        """
        sign = -1 if self.better == "lower" else 1
        ours, theirs = self.values(cell), self.values(other)
        return {seed: sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs}

    def best_teacher(self) -> float | None:
        """The mean over seeds of the best teacher's value; None without teachers."""
        if not self.better:
            return None
        best = max if self.better == "higher" else min
        found: list[float] = []
        for row in self.rows.values():
            finite = [value for name, value in row.finite().items() if name in self.teachers]
            found += [best(finite)] if finite else []
        return mean(found) if found else None

    def protocols(self) -> list[str]:
        """All that another needs to know to get the same numbers; each once."""
        rows = self.rows.values()
        return list(dict.fromkeys(text for row in rows for text in row.protocols.values() if text))


@dataclass(frozen=True)
class Unfinished:
    """A run without a student."""

    cell: str
    seed: int
    error: str
    """The last line of its log; empty if it was never started."""
    log: str

    def describe(self) -> str:
        """The run and its error in words."""
        if not self.error:
            return f"{self.cell}, seed {self.seed}: not started"
        return f"{self.cell}, seed {self.seed}: {self.error} ({self.log})"


@dataclass(frozen=True)
class Results:
    """All that is known of a grid."""

    study: Study
    measures: Sequence[Measure]
    unfinished: Sequence[Unfinished]
    not_evaluated: Sequence[int] = ()
    """Seeds with students, but without an evaluation of these students by these settings."""

    @cached_property
    def cells(self) -> list[str]:
        """The cells that were evaluated."""
        return [c for c in self.study.cells if any(m.values(c) for m in self.measures)]

    @cached_property
    def teachers(self) -> list[str]:
        """The teachers that were evaluated."""
        names = (row.name for row in self.study.base.teachers)
        return [name for name in names if any(m.values(name) for m in self.measures)]

    def seeds_of(self, cell: str) -> list[int]:
        """The seeds with values of a cell."""
        known = {seed for measure in self.measures for seed in measure.values(cell)}
        return [seed for seed in self.study.grid.seeds if seed in known]

    def ranks(self) -> tuple[dict[str, float], int]:
        """Average rank of each cell by its means (1: best), and over how many measures.

        Of the cells with values of all seeds, and over the measures by which all these are known.
        """
        seeds = {seed for measure in self.measures for seed in measure.rows}
        ranked = [cell for cell in self.cells if len(self.seeds_of(cell)) == len(seeds)]
        rows = [Row(m.name, m.unit, m.better, m.means(ranked)) for m in self.measures]
        return Comparison(dict.fromkeys(ranked, "student"), rows).average_ranks()

    def incomplete(self) -> list[str]:
        """The cells without finite values of all seeds by some measure."""
        ranked = [measure for measure in self.measures if measure.better]
        return [cell for cell in self.cells if not all(m.complete(cell) for m in ranked)]

    def plain(self) -> dict[str, Any]:
        """As JSON; a value that is not finite is null."""
        grid, (ranks, count) = self.study.grid, self.ranks()
        return {
            "recipe": grid.recipe,
            "settings": self.study.settings,
            "seeds": list(grid.seeds),
            "tasks": grid.tasks,
            "baseline": self.study.baseline,
            "cells": {
                cell: {
                    "settings": options,
                    "seeds": self.seeds_of(cell),
                    "compared_with": self.study.compared_with(cell),
                    "average_rank": ranks.get(cell),
                }
                for cell, options in self.study.cells.items()
            },
            "measures_of_average_rank": count,
            "measures": list(map(self.measure_plain, self.measures)),
            "unfinished": [vars(run) for run in self.unfinished],
            "not_evaluated": list(self.not_evaluated),
        }

    def measure_plain(self, measure: Measure) -> dict[str, Any]:
        """A measure as JSON."""
        return {
            "name": measure.name,
            "unit": measure.unit,
            "better": measure.better,
            "protocols": measure.protocols(),
            "best_teacher": measure.best_teacher(),
            "teachers": {
                name: values_plain(values)
                for name in self.teachers
                if (values := measure.values(name))
            },
            "cells": {
                cell: values_plain(measure.values(cell))
                | {
                    "minus_best_teacher": plain_or_none(measure.gains(cell)),
                    "minus_compared": plain_or_none(self.differences(measure, cell)),
                }
                for cell in self.cells
                if measure.values(cell)
            },
        }

    def differences(self, measure: Measure, cell: str) -> BySeed:
        """Differences to the cell that a cell is compared with; none for the baseline."""
        other = self.study.compared_with(cell)
        return measure.differences(cell, other) if other else {}


def values_plain(values: BySeed) -> dict[str, Any]:
    """Values by seed and their spread as JSON."""
    found = spread(values)
    by_seed = {str(seed): null_if_not_finite(value) for seed, value in values.items()}
    nothing = {"mean": None, "std": None, "seeds": 0}
    return {"values": by_seed} | (found.plain() if found else nothing)


def plain_or_none(values: BySeed) -> dict[str, Any] | None:
    """The spread of values as JSON; None if there are none."""
    found = spread(values)
    return found.plain() if found else None


def collect(study: Study) -> Results:
    """The results of the evaluations of the present students; ValueError for a damaged one."""
    found, missing = {}, []
    for seed in study.grid.seeds:
        if evaluations.up_to_date(study, seed):
            found[seed] = comparison.read(evaluations.folder_of(study, seed))
        elif evaluations.students(study, seed):
            missing.append(seed)
    return Results(study, measures_of(found), list(unfinished(study)), missing)


def measures_of(found: Mapping[int, Comparison]) -> list[Measure]:
    """The measures of the comparisons of several seeds, in their order."""
    measures: dict[str, Measure] = {}
    for seed, table in found.items():
        for row in table.rows:
            measure = measures.setdefault(row.name, Measure(row.name, row.unit, row.better))
            measure.rows[seed] = row
            measure.teachers = table.named("teacher")
    return list(measures.values())


def unfinished(study: Study) -> Iterator[Unfinished]:
    """The runs without a student."""
    for run in study.runs():
        if not run.finished:
            yield Unfinished(run.cell, run.seed, last_error(run.log), str(run.log))


def write(results: Results) -> Path:
    """Write `ablation.json` atomically; returns its path."""
    file = results.study.out / FILE
    write_atomic(file, json.dumps(results.plain(), indent=1, allow_nan=False) + "\n")
    return file
