"""Candidates and budget of `--teachers auto`, and its choice, which the run folder keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unic_ds import files
from unic_ds.config import Config
from unic_ds.config.overrides import flatten, to_dict
from unic_ds.config.teacher_source import TeacherSource
from unic_ds.files import run_files
from unic_ds.files.documents import read_json
from unic_ds.files.printable import printable

COMPARED = ("data.train", "seed", "student.model", "student.size")
ROW = ("source", "size", "resize", "patch", "mean", "std", "block")
"""Settings, of a run and of a teacher, that a comparison depends on."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A choice that is asked for."""

    budget: float
    """GFLOPs of an image that the chosen teachers may cost together."""
    words: Mapping[str, str]
    """Name of a candidate -> its word in `--among`."""
    settings: Mapping[str, str]
    """Dotted name -> text of what the comparison depends on."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A teacher that was chosen: `coverage` is of all that are chosen by then, `cost` their sum."""

    teacher: str
    coverage: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The teachers that a comparison chose, in its order, and why others were left out."""

    budget: float
    settings: Mapping[str, str]
    steps: tuple[Step, ...]
    left_out: Mapping[str, str]

    @property
    def chosen(self) -> list[str]:
        """Names of the chosen teachers."""
        return [step.teacher for step in self.steps]

    @property
    def candidates(self) -> list[str]:
        """Names of all teachers that were compared."""
        return [*self.chosen, *self.left_out]

    def answers(self, wanted: Wanted) -> bool:
        """True if it is the choice that is asked for."""
        return self.budget == wanted.budget and self.settings == wanted.settings

    def of_same_teachers(self, wanted: Wanted) -> bool:
        """True if budget and candidates are those that are asked for; their settings may differ."""
        return self.budget == wanted.budget and sources(self.settings) == sources(wanted.settings)

    def describe(self) -> list[str]:
        """Lines for the user: what was chosen and why, and what was left out."""
        parts, before, spent = [], 0.0, 0.0
        for step in self.steps:
            gain, cost = step.coverage - before, step.cost - spent
            parts.append(f"{step.teacher} ({gain:+.3f} for {cost:.3g} GFLOPs)")
            before, spent = step.coverage, step.cost
        lines = [
            f"teachers chosen within {self.budget:g} GFLOPs an image: {', '.join(parts)}; together"
            f" they explain {before:.3f} of the variance of all {len(self.candidates)}"
        ]
        return lines + [f"left out: {name} {printable(why)}" for name, why in self.left_out.items()]


def settings_of(cfg: Config) -> dict[str, str]:
    """Dotted name -> text of the settings that a comparison of a Config's teachers depends on."""
    flat = flatten(to_dict(cfg))
    rows = [f"teachers.{row.name}.{key}" for row in cfg.teachers for key in ROW]
    return {name: flat[name] for name in (*COMPARED, *rows)}


def sources(settings: Mapping[str, str]) -> dict[str, str]:
    """Name of each candidate -> its source, without the paths of runs, which may move."""
    return {
        name.split(".")[1]: TeacherSource.parse(text).science
        for name, text in settings.items()
        if name.startswith("teachers.") and name.endswith(".source")
    }


def read(out: Path) -> Choice | None:
    """The choice that a run folder keeps; None without one, or if it is damaged."""
    try:
        plain = read_json(out / run_files.CHOICE)
        return of_plain(plain, plain["budget"], plain["settings"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def of_plain(plain: Mapping[str, Any], budget: float, settings: Mapping[str, str]) -> Choice:
    """The choice of a selection as JSON (`teachers compare` writes one, too).

    ValueError, KeyError, TypeError or AttributeError for other values.
    """
    steps = tuple(
        Step(
            teacher=str(step["teacher"]),
            coverage=math.nan if step["coverage"] is None else float(step["coverage"]),
            cost=float(step["cost"]),
        )
        for step in plain["steps"]
    )
    left_out = {str(name): str(why) for name, why in plain["left_out"].items()}
    found = Choice(budget=float(budget), settings=dict(settings), steps=steps, left_out=left_out)
    if not steps or set(found.candidates) != sources(settings).keys():
        raise ValueError("a choice is of its candidates")
    return found


def write(choice: Choice, out: Path) -> None:
    """Keep a choice in a run folder, atomically."""
    plain = asdict(choice)
    for step in plain["steps"]:
        step["coverage"] = None if math.isnan(step["coverage"]) else step["coverage"]
    text = json.dumps(plain, indent=1, allow_nan=False)
    files.write_atomic(out / run_files.CHOICE, text + "\n")
