"""All that a run folder says of a run. Numpy, no torch; nothing is written.

A run may be writing while it is read, on another machine: a line may be incomplete, a file replaced
or not there yet.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unic_ds.config import Config, job, recipes
from unic_ds.evaluate import comparison
from unic_ds.evaluate.comparison import Comparison
from unic_ds.files import open_regular, read_limited, run_files
from unic_ds.files.documents import LINE, json_lines, parse_line, read_json

MOST_EVENTS = 100_000
"""Events that are kept, the newest."""

HEARTBEAT_BYTES, MOST_HEARTBEATS = 4096, 10_000
"""Bytes of the longest heartbeat, and ranks whose heartbeats are read."""

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""Values that JSON has no number for, as the log writes them."""


class Series(NamedTuple):
    """A logged quantity of N > 0 log lines, finite or not, in the order of the steps."""

    step_N: NDArray[np.int64]
    value_N: NDArray[np.float64]


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl."""

    time: datetime
    """In UTC."""
    name: str
    """`skipped`, `rolled back`, `failed`, `extended`, `warning`, ..."""
    step: int | None
    facts: Mapping[str, object]
    """The rest of the line."""


@dataclass(frozen=True)
class RunRecord:
    """All that a run folder says of a run, or of one of its stages."""

    folder: Path
    name: str
    """Of the folder."""
    settings: Config
    series: Mapping[str, Series]
    """By the names of log.jsonl: `loss`, `lr`, `images_per_s`, `dinov2/kept`, `probe/knn`, ..."""
    events: Sequence[Event]
    teachers: Mapping[str, Mapping[str, object]]
    """teachers.json; empty as long as the run has not written it."""
    comparison: Comparison | None
    """evaluation.json; None as long as the run has none."""
    steps: int | None
    """Optimiser steps of the whole run, as far as they are known."""
    finished: bool
    """True if the student is exported and evaluated."""
    written: datetime | None
    """Time in UTC at which the log was last written; None without a log."""
    heartbeats: Sequence[Mapping[str, object]] = ()
    """Of the ranks of a start that has not ended cleanly, by rank."""
    start: Mapping[str, object] = field(default_factory=dict)
    """start.json: facts of the latest start; empty for runs of older versions."""

    @property
    def last_step(self) -> int:
        """The step of the last log line; 0 without one."""
        return max((int(found.step_N[-1]) for found in self.series.values()), default=0)


class Column:
    """A logged quantity that grows at its end."""

    def __init__(self) -> None:
        self.step_N, self.value_N = np.empty(0, np.int64), np.empty(0, np.float64)
        self.count = 0
        """Numbers in `step_N` and `value_N`; the rest of these is room."""
        self.new_steps, self.new_values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        """Add a number."""
        self.new_steps.append(step)
        self.new_values.append(value)

    def series(self) -> Series:
        """The numbers so far, read-only; only those since the last call are copied."""
        begin, self.count = self.count, self.count + len(self.new_steps)
        if self.count > len(self.step_N):
            self.step_N, self.value_N = (
                np.concatenate([x_N[:begin], np.empty(2 * self.count - begin, x_N.dtype)])
                for x_N in (self.step_N, self.value_N)
            )
        self.step_N[begin : self.count] = self.new_steps
        self.value_N[begin : self.count] = self.new_values
        self.new_steps, self.new_values = array("q"), array("d")
        step_N, value_N = self.step_N[: self.count], self.value_N[: self.count]
        step_N.flags.writeable = value_N.flags.writeable = False
        return Series(step_N, value_N)


class Columns:
    """Columns of a log's numbers that grow by its lines."""

    def __init__(self) -> None:
        self.columns: dict[str, Column] = {}
        self.last_step, self.sorted = 0, True

    def add(self, row: Mapping[str, object]) -> None:
        """Add a line's numbers; a line without a step is dropped."""
        step = row.get("step")
        if type(step) is not int or not 0 < step < 2**63:
            return
        self.sorted = self.sorted and step > self.last_step
        self.last_step = step
        for name, value in row.items():
            number = value if type(value) is float else number_of(value)
            if number is not None and name != "step":
                if name not in self.columns:
                    self.columns[name] = Column()
                self.columns[name].add(step, number)

    def series(self) -> dict[str, Series]:
        """The columns so far, read-only; of several lines of one step the last counts."""
        found = {name: column.series() for name, column in self.columns.items()}
        return found if self.sorted else {name: sorted_by_step(s) for name, s in found.items()}


class GrowingLog:
    """The numbers of a log file that another process may append to, or replace."""

    def __init__(self, file: Path):
        self.file = file
        self.inode, self.offset, self.columns = 0, 0, Columns()

    def update(self) -> None:
        """Read the lines that were added; all of them if the file was replaced or cut.

        An incomplete last line is left for the next call. Without a file nothing changes.
        """
        try:
            stream = open_regular(self.file)
        except OSError:
            return
        with stream:
            status = os.fstat(stream.fileno())
            if status.st_size < self.offset or status.st_ino != self.inode:
                self.inode, self.offset, self.columns = status.st_ino, 0, Columns()
            stream.seek(self.offset)
            while line := stream.readline(LINE):
                row = parse_line(line)
                if row is None and not line.endswith(b"\n") and len(line) < LINE:
                    break
                self.offset += len(line)
                if row is not None:
                    self.columns.add(row)


def read(folder: Path, log: GrowingLog | None = None) -> RunRecord:
    """The record of a run folder; with `log`, which is brought up to date, only new lines are read.

    ValueError if it is no run folder, or one whose settings this version cannot read. A log that
    was cut short is read up to there.
    """
    settings = read_settings(folder)
    log = log or GrowingLog(folder / run_files.LOG)
    log.update()
    start = optional_json(folder / run_files.START)
    return RunRecord(
        folder=folder,
        name=folder.absolute().name,
        settings=settings,
        series=log.columns.series(),
        events=read_events(folder / run_files.EVENTS),
        teachers=read_teachers(folder / run_files.TEACHERS),
        comparison=read_comparison(folder),
        steps=steps_of(settings, start, log.columns.last_step, finished=job.ended(folder)),
        finished=job.ended(folder),
        written=written_at(folder / run_files.LOG),
        heartbeats=read_heartbeats(folder / run_files.HEARTBEATS),
        start=start,
    )


def read_settings(folder: Path) -> Config:
    """The settings of a run folder; ValueError if it has none that this version can read."""
    file = folder / "config.yaml"
    if job.kind_of(str(file)) != "file":
        raise ValueError(
            f"{str(folder)!r} is no run folder: it has no config.yaml; give a run's --out"
        )
    try:
        return recipes.read(file)
    except ValueError as error:
        raise ValueError(
            f"{error}; if another version of unic_ds wrote this run, read it with that version"
        ) from None


def stages(folder: Path) -> list[Path]:
    """The folders of a run's stages in order; the last is the run's own. Errors as `read`."""
    settings = read_settings(folder)
    return [stage for _, stage in job.staged(settings, folder)]


def current_stage(folder: Path) -> Path:
    """The folder of the first stage that is not finished, or of the last."""
    found = stages(folder)
    unfinished = (stage for stage in found[:-1] if not job.ended(stage))
    begun = next(unfinished, found[-1])
    return begun if job.kind_of(str(begun / "config.yaml")) == "file" else folder


def run_of_stage(folder: Path) -> list[Path]:
    """The run folder that a folder is an earlier stage of, as a list; empty if there is none."""
    try:
        return [folder.parent] if folder in stages(folder.parent)[:-1] else []
    except (OSError, ValueError):  # the folder above is no run's
        return []


def number_of(value: object) -> float | None:
    """A logged number, which may be the name of one that is not finite; None for anything else."""
    if isinstance(value, str):
        return NOT_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def sorted_by_step(series: Series) -> Series:
    """A series in the order of its steps, with the last line of each."""
    step_M, from_end_M = np.unique(series.step_N[::-1], return_index=True)
    return Series(step_M, series.value_N[::-1][from_end_M])


def read_events(file: Path) -> list[Event]:
    """The newest `MOST_EVENTS` events of a file, without lines that are none."""
    found = (event_of(row) for row in json_lines(file) if row is not None)
    return list(deque((event for event in found if event), maxlen=MOST_EVENTS))


def event_of(row: Mapping[str, object]) -> Event | None:
    """The event of a line; None if it lacks a name or a time."""
    name, time, step = row.get("event"), row.get("time"), row.get("step")
    if not isinstance(name, str) or not isinstance(time, str):
        return None
    try:
        at = datetime.fromisoformat(time)
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    rest = {key: value for key, value in row.items() if key not in ("event", "time", "step")}
    return Event(at, name, step if type(step) is int else None, rest)


def read_teachers(file: Path) -> dict[str, dict[str, object]]:
    """Facts of each teacher; ValueError for a file that is not as a run writes it."""
    found = optional_json(file)
    rows = {name: dict(row) for name, row in found.items() if isinstance(row, dict)}
    if len(rows) < len(found):
        raise ValueError(f"{str(file)!r} must have an object for each teacher; restore the file")
    return rows


def optional_json(file: Path) -> dict[str, object]:
    """The object of a JSON file, empty if there is no such file; ValueError for anything else."""
    if not job.kind_of(str(file)):
        return {}
    try:
        found = read_json(file)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}; restore the file") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object; restore the file")
    return found


def read_comparison(folder: Path) -> Comparison | None:
    """The table of a finished run; None if it has none. ValueError if it cannot be read."""
    names = (comparison.FILE, "results.json")
    if not any(job.kind_of(str(folder / name)) for name in names):
        return None
    return comparison.read(folder)


def read_heartbeats(folder: Path) -> list[dict[str, object]]:
    """The ranks' heartbeats, without files that hold none."""
    rows = []
    for file in sorted(folder.glob("rank_*.json"))[:MOST_HEARTBEATS]:
        try:
            row = parse_line(read_limited(file, HEARTBEAT_BYTES))
        except OSError:
            continue
        if row is not None:
            rows.append(row)
    return rows


def steps_of(
    settings: Config, start: Mapping[str, object], last: int, *, finished: bool
) -> int | None:
    """Optimiser steps of the whole run: by its start, its settings, or, if finished, its log."""
    given = start.get("steps")
    if type(given) is int and given > 0:
        return given
    return settings.optim.steps or (last if finished and last else None)


def written_at(file: Path) -> datetime | None:
    """Time in UTC at which a file was last written; None without one."""
    try:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC)
    except (OSError, ValueError, OverflowError):
        return None
