"""History of a run in OUT/events.jsonl: skipped steps, roll-backs, failures. Never truncated."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from unic_ds import dist
from unic_ds.data.stream import Stream
from unic_ds.files import run_files
from unic_ds.process import console, entry_point, node
from unic_ds.training import run_log
from unic_ds.training.step_guard import SkippedStep

LAUNCH = "TORCHELASTIC_RUN_ID"
REASONS = {"loss": "loss not finite", "gradient": "gradient not finite", "spike": "loss spike"}


class RecordedFailure(RuntimeError):
    """Failure that has its line in events.jsonl already."""


def write(out: Path, event: str, **facts: object) -> None:
    """Append a line from rank 0; it is on the disk when this returns."""
    if dist.rank() == 0:
        append(out, event, **facts)


def note(out: Path, event: str, **facts: object) -> None:
    """Append a line from rank 0, if `out` can be written: it is worth less than the run."""
    with suppress(OSError):
        write(out, event, **facts)


def append(out: Path, event: str, **facts: object) -> None:
    """Append a line with the time, from any rank; in one write, so that lines do not mix."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file = os.open(out / run_files.EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps({"time": now, "event": event} | facts) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def record_failure(out: Path, error: str, *, step: int, phase: str, **facts: object) -> None:
    """Append a line about the exception that ends the run, if `out` can be written."""
    with suppress(OSError):
        append(out, "failed", rank=dist.rank(), step=step, phase=phase, error=error, **facts)


def report_tracker(out: Path, name: str, error: Exception, remedy: str) -> None:
    """Say and record that a tracker is switched off until the next start."""
    summary = entry_point.summary(error)
    console.say(
        f"{name} failed and is switched off until the next start; training goes on: {summary}"
        f" (remedy: {remedy})"
    )
    note(out, "tracker failed", tracker=name, error=summary, remedy=remedy)


@contextmanager
def rendezvous_failures(out: Path) -> Iterator[None]:
    """Context manager that records on rank 0 the error of ranks that cannot train together.

    A restart by torchrun would have the same nodes; a Slurm job is requeued without the unfit ones.
    """
    try:
        yield
    except Exception as error:
        if dist.rank() == 0:
            summary, facts = entry_point.summary(error), {}
            if isinstance(error, node.Unfit):
                exclude = ",".join(error.nodes)
                facts = {"job": os.environ.get(LAUNCH, ""), "says": summary, "exclude": exclude}
                if restart_count() is not None:  # the restart reads it; a first start has no folder
                    with suppress(OSError):
                        out.mkdir(parents=True, exist_ok=True)
            record_failure(out, summary, step=0, phase="meeting", **facts)
        raise


def record_permanent_failure(out: Path, event: str, message: str, **facts: object) -> None:
    """Record a failure that a restart would repeat, so that neither torchrun nor Slurm retries it.

    The line has the id of the launch: ranks that torchrun restarts and the Slurm script look it up.
    """
    write(out, event, job=os.environ.get(LAUNCH, ""), says=message, **facts)


@contextmanager
def record_refusals(out: Path) -> Iterator[None]:
    """Context manager that records a user's mistake (ValueError), if torchrun would restart."""
    try:
        yield
    except ValueError as error:
        if restart_count() is not None:
            record_permanent_failure(out, "refused", str(error))
        raise


def raise_last(out: Path) -> None:
    """Raise RecordedFailure if torchrun has restarted ranks whose failure is permanent."""
    job = os.environ.get(LAUNCH, "")
    failures = [row for row in run_log.read(out / run_files.EVENTS) if row.get("job") == job]
    if restart_count() and failures:
        raise RecordedFailure(f"not tried again: {failures[-1]['says']}")


def restart_count() -> int | None:
    """Times that torchrun has restarted these ranks; None if it never restarts ranks."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def write_skipped_steps(out: Path, skipped: Iterable[SkippedStep], stream: Stream) -> None:
    """Append a line for each skipped step, with the samples of the ranks that caused it.

    The samples are those of all ranks if no rank alone caused it.
    """
    if dist.rank() != 0:
        return
    for (why, ranks), group in groupby(skipped, lambda row: row[1:]):
        steps = [row.step for row in group]
        for step in steps:
            facts = {"step": step, "data_step": stream.data_step(step), "why": why}
            write(out, "skipped", **facts, ranks=ranks, samples=stream.names(step, ranks))
        on = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        numbers = ", ".join(map(str, steps))
        file = out / run_files.EVENTS
        console.say(f"skipped step {numbers}: {REASONS[why]}{on}; the samples are in {file}")
