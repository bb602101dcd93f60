"""Findings about the run's health, by its log lines: rank 0 prints each once and records it.

The log lines are kept in memory, and nothing is read from the device. A finding that has an event
already, of an earlier start or before a roll-back, is not repeated. Checks take at most 2 % of the
time, and one that fails ends no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from unic_ds import dist
from unic_ds.files import run_files
from unic_ds.files.printable import printable
from unic_ds.process import console
from unic_ds.report import health, run_record
from unic_ds.report.health import Finding
from unic_ds.report.run_record import Event, GrowingLog, RunRecord
from unic_ds.training import events
from unic_ds.training.side_action import SideAction
from unic_ds.training.state import RunContext, TrainState

LINES = 10
"""Log lines after which the run is checked, if its checks take little enough of its time."""

EVENT = "warning"


class HealthEvents:
    """Checks the log of a start; only rank 0 does."""

    def __init__(self, run: RunContext, state: TrainState):
        self.run, self.state = run, state
        self.log = GrowingLog(run.out / run_files.LOG)
        self.known: set[tuple[object, object]] = set()
        self.start: dict[str, object] = {}
        how = {"name": "health check", "instead": f"`unic-ds watch {run.out}` shows what it finds"}
        self.opened = SideAction(self.open, **how)
        self.checked = SideAction(self.find, **how)
        self.opened.run()

    def open(self) -> None:
        """Read what the run folder has of earlier starts."""
        self.log.update()
        self.start = run_record.optional_json(self.run.out / run_files.START)
        self.known = {
            (event.facts.get("kind"), event.facts.get("teacher"))
            for event in run_record.read_events(self.run.out / run_files.EVENTS)
            if event.name == EVENT
        }

    def add(self, row: Mapping[str, object]) -> None:
        """Add a log line."""
        if dist.rank() == 0:
            self.log.columns.add(row)

    def check(self) -> None:
        """Print and record the findings that are new, if a check is due."""
        if not self.opened.failed:
            self.checked.run()

    def find(self) -> None:
        """Print and record the findings that are new."""
        for finding in health.findings(self.record()):
            key = finding.kind, finding.teacher
            if key not in self.known:
                self.known.add(key)
                self.report(finding)

    def report(self, finding: Finding) -> None:
        """Print a finding, and append it to events.jsonl if that can be written."""
        console.say(printable(f"warning: {finding.message}; {finding.remedy}", 1000))
        events.note(
            self.run.out,
            EVENT,
            step=self.state.step,
            since=finding.step,
            kind=finding.kind,
            teacher=finding.teacher,
            says=finding.message,
            remedy=finding.remedy,
        )

    def record(self) -> RunRecord:
        """The record of the run so far, as it is in memory."""
        now = datetime.now(UTC)
        return RunRecord(
            folder=self.run.out,
            name=self.run.out.name,
            settings=self.run.cfg,
            series=self.log.columns.series(),
            events=[Event(now, "rolled back", None, dict(row)) for row in self.state.rollbacks],
            teachers={},
            comparison=None,
            steps=self.run.steps,
            finished=False,
            written=None,
            start=self.start,
        )
