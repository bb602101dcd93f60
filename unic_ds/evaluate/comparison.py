"""Scores of models side by side: the best of each row, and the student's gain on its teachers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import rankdata

from unic_ds.files import read_text, write_atomic

FILE = "evaluation.json"
STUDENT_AFTER = "student after"
"""The trained student, in the table of a run."""

Better = Literal["higher", "lower", ""]
Role = Literal["student", "teacher", "baseline"]


class Score(NamedTuple):
    """One number of the table."""

    model: str
    name: str
    """Row of the table: the evaluator's name, or that and more if it yields several."""
    value: float
    protocol: str
    """All that another needs to know to get the same number: `knn k=10 T=0.07 cosine 224 px`."""
    unit: str = "%"
    """Printed beside the name; empty: a plain number."""
    better: Better = "higher"
    """Order of the models; empty: a diagnosis, by which they are not ranked."""


@dataclass
class Row:
    """One measure of all models."""

    name: str
    unit: str
    better: Better
    values: dict[str, float] = field(default_factory=dict)
    """By model; a model may be missing."""
    protocols: dict[str, str] = field(default_factory=dict)

    def finite(self) -> dict[str, float]:
        """The values that are finite, by model."""
        return {name: value for name, value in self.values.items() if math.isfinite(value)}

    def best(self) -> list[str]:
        """The models with the best finite value; several if they are equal."""
        finite = self.finite()
        if not self.better or not finite:
            return []
        best = (max if self.better == "higher" else min)(finite.values())
        return [name for name, value in finite.items() if value == best]

    def gain(self, student: str, roles: Mapping[str, Role]) -> float | None:
        """The student's value minus its best teacher's; None if either has no finite value.

        Positive is better, also for a measure of which less is better.
        """
        finite = self.finite()
        teachers = [value for name, value in finite.items() if roles.get(name) == "teacher"]
        if not self.better or student not in finite or not teachers:
            return None
        sign = 1 if self.better == "higher" else -1
        return sign * (finite[student] - sign * max(sign * value for value in teachers))

    def relative_gain(self, student: str, roles: Mapping[str, Role]) -> float | None:
        """`gain` in % of the best teacher's value (arXiv 2408.05088); None as there, or by 0."""
        gain = self.gain(student, roles)
        if gain is None:
            return None
        sign = 1 if self.better == "higher" else -1
        best = abs(self.values[student] - sign * gain)
        return 100 * gain / best if best else None


@dataclass
class Comparison:
    """All scores of an evaluation."""

    roles: dict[str, Role]
    """Model -> role, in the order of the table's columns."""
    rows: list[Row]

    @classmethod
    def of(cls, scores: Iterable[Score], roles: Mapping[str, Role]) -> Comparison:
        """Scores in rows, in the order in which they come."""
        rows: dict[str, Row] = {}
        for score in scores:
            row = rows.setdefault(score.name, Row(score.name, score.unit, score.better))
            row.values[score.model] = score.value
            row.protocols[score.model] = score.protocol
        return cls(dict(roles), list(rows.values()))

    def named(self, role: Role) -> list[str]:
        """The models of a role."""
        return [name for name, found in self.roles.items() if found == role]

    def average_ranks(self) -> tuple[dict[str, float], int]:
        """Average rank of students and teachers (1: best), and over how many rows.

        Rows with a finite value of each of them count; equal values share their ranks' mean.
        """
        names = [*self.named("teacher"), *self.named("student")]
        shared = [row for row in self.rows if row.better and set(names) <= row.finite().keys()]
        if len(names) < 2 or not shared:
            return {}, 0
        rank_RM = np.array([self.ranks(row, names) for row in shared])
        return dict(zip(names, rank_RM.mean(0).tolist(), strict=True)), len(shared)

    @staticmethod
    def ranks(row: Row, names: Sequence[str]) -> list[float]:
        """Ranks of the models in a row, the best first."""
        sign = -1 if row.better == "higher" else 1
        return list(rankdata([sign * row.values[name] for name in names]))

    def plain(self) -> dict[str, Any]:
        """The comparison as JSON, with what follows from it."""
        students = self.named("student")
        ranks, count = self.average_ranks()
        rows = [
            {
                "name": row.name,
                "unit": row.unit,
                "better": row.better,
                "values": {m: null_if_not_finite(x) for m, x in row.values.items()},
                "protocols": row.protocols,
                "best": row.best(),
                "student_minus_best_teacher": {s: row.gain(s, self.roles) for s in students},
                "relative_gain_percent": {s: row.relative_gain(s, self.roles) for s in students},
            }
            for row in self.rows
        ]
        rank = {"average_rank": ranks, "rows_of_average_rank": count}
        return {"models": self.roles, "rows": rows} | rank

    def write(self, folder: Path) -> None:
        """Write `evaluation.json`, then `results.json` (model -> row -> value), each atomically."""
        for name, plain in ((FILE, self.plain()), ("results.json", self.by_model())):
            write_atomic(folder / name, json.dumps(plain, indent=1, allow_nan=False))

    def by_model(self) -> dict[str, dict[str, float | None]]:
        """Model -> row -> value, None for one that is not finite."""
        return {
            model: {
                row.name: null_if_not_finite(row.values[model])
                for row in self.rows
                if model in row.values
            }
            for model in self.roles
            if any(model in row.values for row in self.rows)
        }


def read(folder: Path) -> Comparison:
    """The comparison of a finished run; ValueError if its files are not as `write` leaves them.

    Versions before `evaluation.json` wrote accuracies in % without protocols.
    """
    file = folder / FILE
    try:
        if file.is_file():
            plain = json.loads(read_text(file))
            return Comparison(plain["models"], [row_of(row) for row in plain["rows"]])
        file = folder / "results.json"
        by_model = json.loads(read_text(file))
        scores = [
            Score(model, name, nan_if_null(value), "")
            for model, values in by_model.items()
            for name, value in values.items()
        ]
        return Comparison.of(scores, {model: role_of(model) for model in by_model})
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(file)!r} is no result of an evaluation ({error!r})") from None


def null_if_not_finite(value: float) -> float | None:
    """The value, None if it is NaN or infinite, for which JSON has no number."""
    return value if math.isfinite(value) else None


def nan_if_null(value: float | None) -> float:
    """The value, NaN for None."""
    return math.nan if value is None else float(value)


def row_of(plain: Mapping[str, Any]) -> Row:
    """A row of `evaluation.json`, in which a value that is not finite is null."""
    values = {model: nan_if_null(value) for model, value in plain["values"].items()}
    return Row(plain["name"], plain["unit"], plain["better"], values, dict(plain["protocols"]))


def role_of(model: str) -> Role:
    """Role of a model by its name in older results."""
    if model in ("pixels", "student before"):
        return "baseline"
    return "student" if model == STUDENT_AFTER else "teacher"
