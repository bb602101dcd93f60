"""Is a student as good as the best teacher? Tables from the results of `unic-ds ablate`.

python tests/results/promise.py GRID [GRID ...]

Each GRID is the folder of a grid that was evaluated by `transfer,transfer_knn`. The score of a
model on a set is the mean of its kNN and linear accuracy. The best teacher of a set and seed has
the highest score there; the best single teacher has the highest mean over sets and seeds.
Prints Markdown: a row per cell, means and standard deviations over seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

KNN, LINEAR, MEAN = "transfer_knn ", "transfer ", "mean"

Scores = Mapping[str, Mapping[str, float]]
"""Seed -> set -> mean of kNN and linear accuracy in %."""


class Grid:
    """Scores of a grid's cells and teachers."""

    def __init__(self, folder: Path) -> None:
        plain = json.loads((folder / "ablation.json").read_text())
        measures = {measure["name"]: measure for measure in plain["measures"]}
        names = [n.removeprefix(KNN) for n in measures if n.startswith(KNN)]
        self.name = folder.name
        self.sets = [name for name in names if name != MEAN]
        self.cells = self.of("cells", measures)
        self.teachers = self.of("teachers", measures)

    def of(self, role: str, measures: Mapping[str, Any]) -> dict[str, Scores]:
        """The scores of all models of a role."""
        found: dict[str, Scores] = {}
        for model, values in measures[LINEAR + MEAN][role].items():
            found[model] = {
                seed: {
                    name: fmean(
                        measures[kind + name][role][model]["values"][seed] for kind in (KNN, LINEAR)
                    )
                    for name in self.sets
                }
                for seed in values["values"]
            }
        return found

    def best_single(self) -> str:
        """The teacher with the highest mean over sets and seeds."""
        return max(self.teachers, key=lambda name: fmean(self.mean_over_sets(self.teachers[name])))

    def mean_over_sets(self, scores: Scores) -> list[float]:
        """The mean over the sets, of each seed."""
        return [fmean(by_set.values()) for by_set in scores.values()]

    def differences(self, scores: Scores, name: str) -> list[float]:
        """A model's score of a set minus the best teacher's, of each seed."""
        best = {
            seed: max(teacher[seed][name] for teacher in self.teachers.values()) for seed in scores
        }
        return [by_set[name] - best[seed] for seed, by_set in scores.items()]

    def to_best_single(self, scores: Scores) -> list[float]:
        """A model's mean over the sets minus that of the best single teacher, of each seed."""
        teacher = self.teachers[self.best_single()]
        return [
            fmean(by_set.values()) - fmean(teacher[seed].values())
            for seed, by_set in scores.items()
        ]


def text(values: Iterable[float], *, signed: bool = False) -> str:
    """Mean and sample standard deviation; no deviation for one value."""
    found = list(values)
    middle = f"{fmean(found):{'+' if signed else ''}.1f}"
    return middle if len(found) == 1 else f"{middle} +- {stdev(found):.1f}"


def table(grid: Grid) -> list[str]:
    """A row per cell and teacher: score of each set, their mean, its difference to the teachers."""
    head = ["cell", *grid.sets, "mean", f"- {grid.best_single()}, the best single teacher"]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, scores in grid.cells.items():
        cells = [
            f"{text(by_set[s] for by_set in scores.values())}"
            f" ({text(grid.differences(scores, s), signed=True)})"
            for s in grid.sets
        ]
        means = text(grid.mean_over_sets(scores))
        gain = text(grid.to_best_single(scores), signed=True)
        rows.append(f"| `{name}` | {' | '.join([*cells, means, gain])} |")
    for name, scores in grid.teachers.items():
        cells = [text(by_set[s] for by_set in scores.values()) for s in grid.sets]
        means = text(grid.mean_over_sets(scores))
        rows.append(f"| teacher {name} | {' | '.join([*cells, means, ''])} |")
    return rows


def main(folders: list[str]) -> None:
    """Print a table of each grid."""
    for folder in folders:
        grid = Grid(Path(folder))
        print(f"\n{grid.name}; in brackets: minus the best teacher of the set and seed\n")
        print("\n".join(table(grid)))


if __name__ == "__main__":
    main(sys.argv[1:])
