"""What happened to a run beside learning: lines of OUT/events.jsonl, kept whatever comes after."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from unic_ds import dist
from unic_ds.process import console, entry_point, node
from unic_ds.training import run_log
from unic_ds.training.step_guard import SkippedStep

FILE = "events.jsonl"
LAUNCH = "TORCHELASTIC_RUN_ID"
WORDS = {"loss": "loss not finite", "gradient": "gradient not finite", "spike": "loss spike"}


class Ended(RuntimeError):
    """The failure of a run whose events already have the line about its end."""


def write(out: Path, event: str, **facts: Any) -> None:
    """A line from rank 0, which is on the disk before the run goes on."""
    if dist.rank() == 0:
        append(out, event, **facts)


def append(out: Path, event: str, **facts: Any) -> None:
    """A line with the time, from any rank; in one write, so that lines do not mix."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file = os.open(out / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps({"time": now, "event": event} | facts) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def failed(out: Path, error: str, *, step: int, phase: str, **facts: Any) -> None:
    """Append a line about the exception that ends the run; nothing where `out` cannot take it."""
    with suppress(OSError):
        append(out, "failed", rank=dist.rank(), step=step, phase=phase, error=error, **facts)


@contextmanager
def rendezvous_failures(out: Path) -> Iterator[None]:
    """Record, on rank 0, why the ranks cannot train together.

    torchrun's next try would have the same nodes; a Slurm job is requeued without those at fault.
    """
    try:
        yield
    except Exception as error:
        if dist.rank() == 0:
            says, facts = entry_point.summary(error), {}
            if isinstance(error, node.Unfit):
                exclude = ",".join(error.nodes)
                facts = {"job": os.environ.get(LAUNCH, ""), "says": says, "exclude": exclude}
                if tries() is not None:  # a first start has no folder in which to tell the next
                    with suppress(OSError):
                        out.mkdir(parents=True, exist_ok=True)
            failed(out, says, step=0, phase="meeting", **facts)
        raise


def end(out: Path, event: str, says: str, **facts: Any) -> None:
    """A line about an end to which the same start would come again: nobody is to try it by itself.

    It bears the launch's name, by which torchrun's next try and the Slurm job know it.
    """
    write(out, event, job=os.environ.get(LAUNCH, ""), says=says, **facts)


@contextmanager
def record_refusals(out: Path) -> Iterator[None]:
    """Make a line of a user's mistake that the ranks find, where torchrun would try it again."""
    try:
        yield
    except ValueError as error:
        if tries() is not None:
            end(out, "refused", str(error))
        raise


def raise_last(out: Path) -> None:
    """Raise Ended where torchrun tries again what came to its end."""
    ends = [row for row in run_log.read(out / FILE) if row.get("job") == os.environ.get(LAUNCH, "")]
    if tries() and ends:
        raise Ended(f"not tried again: {ends[-1]['says']}")


def tries() -> int | None:
    """How often torchrun has started these ranks again; None where it is not to."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def write_skipped_steps(out: Path, troubles: Iterable[SkippedStep], stream: Any) -> None:
    """A line for each step that was not taken, with the samples of the ranks that it was due to.

    They are those of all ranks where it was due to none alone.
    """
    if dist.rank() != 0:
        return
    for (why, ranks), group in groupby(troubles, lambda trouble: trouble[1:]):
        steps = [trouble.step for trouble in group]
        for step in steps:
            facts = {"step": step, "data_step": stream.data_step(step), "why": why}
            write(out, "skipped", **facts, ranks=ranks, samples=stream.names(step, ranks))
        of = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        named = ", ".join(map(str, steps))
        console.say(f"skipped step {named}: {WORDS[why]}{of}; the samples are in {out / FILE}")
