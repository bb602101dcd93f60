"""A run's records at the services, in RUN/trackers.json: a resumed run goes on there.

It has the id of each, and in `steps` the last step of those that cannot be asked.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from threading import Lock

from unic_ds.files import write_atomic
from unic_ds.files.documents import read_json

FILE = "trackers.json"
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
STEPS = "steps"
STORE_S = 5.0
"""Seconds between two writes of a step: those of a killed process may be sent twice."""

_lock = Lock()  # each service has a thread


def read(folder: Path) -> dict[str, object]:
    """The object of the file; empty if there is no readable one."""
    try:
        found = read_json(folder / FILE)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_ids(folder: Path) -> dict[str, str]:
    """Id of the record at each service; none if there is no readable file."""
    rows = read(folder).items()
    return {k: v for k, v in rows if isinstance(v, str) and ID.fullmatch(v)}


def read_steps(folder: Path) -> dict[str, int]:
    """The last step that each service has; none if there is no readable file."""
    found = read(folder).get(STEPS)
    rows = found.items() if isinstance(found, dict) else ()
    return {k: v for k, v in rows if type(v) is int and 0 <= v < 2**63}


def store(folder: Path, service: str, *, record: str, step: int | None = None) -> None:
    """Set the id of the record at a service, and the last step that it has, if we have to know."""
    with _lock:
        rows: dict[str, object] = {**read_ids(folder), service: record}
        steps = read_steps(folder) | ({} if step is None else {service: step})
        write_atomic(folder / FILE, json.dumps(rows | {STEPS: steps}, indent=2) + "\n")


class SentSteps:
    """The last step that a record has, in memory, and every few seconds in the file."""

    def __init__(self, folder: Path, service: str, *, record: str, last: int):
        self.folder, self.service, self.record, self.last = folder, service, record, last
        self.next_time = 0.0
        self.store()

    def store(self) -> None:
        """Write the step to the file."""
        store(self.folder, self.service, record=self.record, step=self.last)
        self.next_time = time.monotonic() + STORE_S

    def add(self, step: int) -> None:
        """Set the last step, if it is a later one."""
        self.last = max(self.last, step)
        if time.monotonic() >= self.next_time:
            self.store()
