"""Sections of a report: settings, evaluations, teachers, events and a summary of each run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

from unic_ds.config import Config, Teacher, overrides
from unic_ds.evaluate import table
from unic_ds.evaluate.comparison import STUDENT_AFTER, Comparison, Score
from unic_ds.files.printable import printable
from unic_ds.report import cost, event_words, health, run_record
from unic_ds.report.run_record import Event, RunRecord
from unic_ds.report.wording import duration

EVENTS = 300
"""Events that a page lists, the newest of each run; all stand in events.jsonl."""

EVENT_TEXT = 300
"""Characters of an event in words."""

ROWS, MODELS = 200, 40
"""Rows and models of a table of an evaluation."""


@dataclass(frozen=True)
class Setting:
    """A setting and its text in each run; "" where a run does not have it."""

    name: str
    values: Sequence[str]
    default: str


@dataclass(frozen=True)
class Cell:
    """A value of an evaluation."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Measure:
    """A row of an evaluation."""

    name: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Evaluation:
    """A table of an evaluation, and how its numbers were measured."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Measure]
    notes: Sequence[str]


@dataclass(frozen=True)
class EventRow:
    """An event in words."""

    run: str
    time: str
    name: str
    step: int | None
    text: str
    kind: str


@dataclass(frozen=True)
class Run:
    """A run in the head of the page."""

    label: str
    folder: str
    state: str
    step: int
    steps: int | None
    updated: str
    duration: str
    figures: Sequence[tuple[str, str]]
    cost: cost.Cost | None
    findings: Sequence[health.Finding]
    stages: Sequence[str]


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Name of each folder, with as many parents as tell them apart; a stage's with its run's."""
    paths = [folder.absolute().parts for folder in folders]
    count = 2 if any(run_record.run_of_stage(folder) for folder in folders) else 1
    while len({parts[-count:] for parts in paths}) < len(paths):
        count += 1
    return ["/".join(parts[-count:]) for parts in paths]


def run_of(record: RunRecord, label: str) -> Run:
    """The head of a run."""
    found = cost.of(record)
    return Run(
        label=label,
        folder=str(record.folder),
        state="finished" if record.finished else "not finished",
        step=record.last_step,
        steps=record.steps,
        updated=time_text(record.written) if record.written else "no log line yet",
        duration=duration(found.seconds) if found else "-",
        figures=figures(record),
        cost=found,
        findings=health.findings(record),
        stages=sorted(p.name for p in record.folder.glob("stage[0-9]*") if p.is_dir()),
    )


def figures(record: RunRecord) -> list[tuple[str, str]]:
    """The last values that people ask for first."""
    words = {
        "loss": ("Loss", "{:.4f}"),
        "images_per_s": ("Images per second", "{:.0f}"),
        "mem_gb": ("Peak memory", "{:.1f} GB"),
        "data_wait_share": ("Data wait", "{:.0%}"),
        "mfu": ("MFU", "{:.0%}"),
        "bad_images": ("Unreadable images", "{:.0f}"),
    }
    return [
        (title, shape.format(series.value_N[-1]) if math.isfinite(series.value_N[-1]) else "-")
        for name, (title, shape) in words.items()
        if (series := record.series.get(name)) and len(series.value_N)
    ]


def time_text(time: datetime) -> str:
    """A time in UTC to the minute."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def settings(configs: Sequence[Config]) -> tuple[list[Setting], list[Setting]]:
    """(settings that differ, all settings).

    Of several runs those differ whose text is not the same in all, of one those that are not the
    default of a run without a recipe.
    """
    texts = [overrides.flatten(overrides.to_dict(cfg)) for cfg in configs]
    default = overrides.flatten(overrides.to_dict(Config())) | teacher_defaults(configs)
    names = list(dict.fromkeys(name for text in texts for name in text))
    rows = [
        Setting(name, [text.get(name, "") for text in texts], default.get(name, ""))
        for name in names
    ]
    if len(configs) > 1:
        return [row for row in rows if len(set(row.values)) > 1], rows
    return [row for row in rows if row.values[0] != row.default], rows


def teacher_defaults(configs: Sequence[Config]) -> dict[str, str]:
    """Dotted name -> default of the settings of each teacher, which has no default source."""
    defaults = {f.name: f.default for f in fields(Teacher) if f.name not in ("name", "source")}
    texts = overrides.flatten(
        {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    )
    return {
        f"teachers.{row.name}.{key}": text
        for cfg in configs
        for row in cfg.teachers
        for key, text in texts.items()
    }


def teachers(
    records: Sequence[RunRecord], labels: Sequence[str]
) -> list[tuple[str, Sequence[Mapping[str, object]]]]:
    """(labels of runs, their teachers): runs with the same teachers share a table."""
    found: dict[str, tuple[list[str], list[Mapping[str, object]]]] = {}
    for record, label in zip(records, labels, strict=True):
        rows = [teacher_row(name, facts) for name, facts in record.teachers.items()]
        found.setdefault(repr(rows), ([], rows))[0].append(label)
    return [(", ".join(names), rows) for names, rows in found.values()]


def teacher_row(name: str, facts: Mapping[str, object]) -> Mapping[str, object]:
    """A teacher's facts as a page shows them; "" for one that is not recorded."""
    keys = ("source", "licence", "parameters", "size", "patch", "precision", "cls", "sha256")
    row: dict[str, object] = {key: facts.get(key, "") for key in keys}
    parameters = row["parameters"]
    if isinstance(parameters, int):
        row["parameters"] = f"{parameters / 1e6:.1f} M"
    return row | {"name": name, "sha256": str(row["sha256"])[:12]}


def evaluation(comparison: Comparison, title: str) -> Evaluation:
    """The table of a run: the best of each row, and the students' gains on the best teacher."""
    rows = comparison.rows[:ROWS]
    models = [name for name in comparison.roles if any(name in row.values for row in rows)]
    models = models[:MODELS]
    gains = [s for s in comparison.named("student") if s in models]
    gains = gains if comparison.named("teacher") else []
    measures = []
    for row in rows:
        best = row.best() if len(row.values) > 1 else []
        cells = [Cell(table.text_of(row, name), name in best) for name in models]
        cells += [Cell(table.gain_text(row, name, comparison)) for name in gains]
        measures.append(Measure(table.label(row), cells))
    columns = [*models, *(f"{name} - best teacher" for name in gains)]
    notes = [*table.rank_lines(comparison), *table.legend(comparison)]
    return Evaluation(title, columns, measures, notes[: 2 * ROWS])


def students_side_by_side(
    comparisons: Sequence[Comparison | None], labels: Sequence[str]
) -> Evaluation | None:
    """The trained students of several runs in one table; None if fewer than two were evaluated."""
    scores = [
        Score(label, row.name, row.values[name], row.protocols.get(name, ""), row.unit, row.better)
        for label, found in zip(labels, comparisons, strict=True)
        if found
        for name in student_of(found)
        for row in found.rows
        if name in row.values
    ]
    roles = {score.model: "student" for score in scores}
    if len(roles) < 2:
        return None
    merged = Comparison.of(scores, roles)  # type: ignore[arg-type]
    found = evaluation(merged, "The students of all runs")
    note = "Best of the runs; compare rows only if their protocols and images are the same."
    return Evaluation(found.title, found.columns, found.rows, [note, *found.notes])


def student_of(found: Comparison) -> list[str]:
    """Column of the trained student, as a list; empty if there is none."""
    students = found.named("student")
    return [STUDENT_AFTER] if STUDENT_AFTER in students else students[:1]


def events(records: Sequence[RunRecord], labels: Sequence[str]) -> list[EventRow]:
    """The newest events of all runs, newest first."""
    share = max(10, EVENTS // max(len(records), 1))
    found = [
        (event.time, event_row(event, label))
        for record, label in zip(records, labels, strict=True)
        for event in record.events[-share:]
    ]
    return [row for _, row in sorted(found, key=lambda pair: pair[0], reverse=True)]


def event_counts(record: RunRecord) -> str:
    """Number of events of each kind, in words."""
    counts = Counter(event.name for event in record.events)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common(12))


def event_row(event: Event, label: str) -> EventRow:
    """An event in words."""
    step = event.step if event.step is not None else event.facts.get("at")
    return EventRow(
        run=label,
        time=f"{event.time:%Y-%m-%d %H:%M:%S}",
        name=event.name,
        step=step if isinstance(step, int) else None,
        text=printable(event_words.text_of(event), EVENT_TEXT),
        kind=event_words.kind_of(event),
    )
