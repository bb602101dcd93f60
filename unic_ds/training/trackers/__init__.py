"""Trackers: log.jsonl and TensorBoard always, and the services of `--run.track`.

Each is a `Tracker` (tracker.py). One that fails is switched off, here alone, and training goes on;
log.jsonl is the run's own, and its failure ends the run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

from unic_ds.config.schedule import SERVICES
from unic_ds.training.trackers.jsonl_tracker import JsonLines
from unic_ds.training.trackers.queued import Queued
from unic_ds.training.trackers.tracker import End, Start, Tracker

REMEDIES = {
    "tensorboard": "see that its folder tb/ can be written",
    "wandb": "`wandb login`, or WANDB_MODE=offline and `wandb sync` later",
    "mlflow": "see that the store of MLFLOW_TRACKING_URI answers and can be written",
}

PROGRAMS = {"wandb": "wandb-core"}
"""Processes that services start."""

PRIVATE = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""Settings of the services' packages, unless the environment has others: they report to nobody."""

OpenTracker = Callable[[], Tracker]

ReportFailure = Callable[[str, Exception, str], None]
"""Function of a tracker's name, its exception and the remedy."""


def check(services: Sequence[str]) -> None:
    """ValueError if the package of a service is not installed; none is imported."""
    for name in services:
        found = find_spec(name)
        if found is None or found.origin is None:  # W&B leaves folders wandb/, no packages
            raise ValueError(
                f"run.track {name} needs a package that is not installed: pip install -e '.[track]'"
            )


def openers(start: Start) -> dict[str, OpenTracker]:
    """Functions that open the services of a run, each in a thread."""
    for name, value in PRIVATE.items():
        os.environ.setdefault(name, value)
    return {name: partial(open_queued, name, start) for name in start.cfg.run.track}


def open_queued(name: str, start: Start) -> Tracker:
    """Start the thread of a service."""
    return Queued(partial(open_service, name, start), program=PROGRAMS.get(name, ""))


def open_service(name: str, start: Start) -> Tracker:
    """Import a service's package and open its record of a run."""
    assert name in SERVICES
    module = importlib.import_module(f"{__name__}.{name}_tracker")
    tracker: Tracker = module.open_tracker(start)
    return tracker


class Trackers:
    """The trackers of rank 0."""

    def __init__(
        self,
        lines: JsonLines,
        others: Mapping[str, OpenTracker],
        *,
        report: ReportFailure | None,
    ):
        """`report` is called once for each of `others` that fails; without it they raise."""
        self.lines, self.report = lines, report
        self.others: dict[str, Tracker] = {}
        for name, open_tracker in others.items():
            with self.switching_off(name):
                self.others[name] = open_tracker()

    @contextmanager
    def switching_off(self, name: str) -> Iterator[None]:
        """Context manager that switches a tracker off, and reports that, if it fails."""
        try:
            yield
        except Exception as error:
            if self.report is None:
                raise
            self.others.pop(name, None)
            self.report(name, error, REMEDIES[name])

    def each(self, call: Callable[[Tracker], None]) -> None:
        """Call all trackers."""
        call(self.lines)
        for name, tracker in list(self.others.items()):
            with self.switching_off(name):
                call(tracker)

    def close(self, end: End) -> None:
        """Close all trackers; services have their seconds at the same time."""
        for name, tracker in list(self.others.items()):
            if isinstance(tracker, Queued):
                with self.switching_off(name):
                    tracker.begin_close(end)
        self.each(lambda tracker: tracker.close(end))
