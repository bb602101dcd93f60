"""A run whose steps are skipped one after another goes back, and on past what it read there.

OUT/rollbacks.json lists how often it did: at which step, to the checkpoint of which, and which
steps of the order are left out for good. It is written before anything else is done, and every
checkpoint saved after it has the same list, so a kill at any moment forgets nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unic_ds import dist
from unic_ds.config import job
from unic_ds.data import order
from unic_ds.files import write_whole
from unic_ds.process import console
from unic_ds.training import checkpoint, events

FILE = "rollbacks.json"


class RollbackNeeded(Exception):
    """Optimiser steps `first` to `last` were all skipped."""

    def __init__(self, first: int, last: int):
        super().__init__(first, last)
        self.first, self.last = first, last


def skipped_spans(rollbacks: list[dict[str, Any]]) -> order.Spans:
    """Which steps of the order are not read."""
    return order.joined((first, last) for first, last in (row["left_out"] for row in rollbacks))


def prune_abandoned(out: Path) -> list[dict[str, Any]]:
    """The run's roll-backs, the same on all ranks; checkpoints that they gave up are removed."""
    rows = dist.on_rank_0(lambda: read(out / FILE))
    if rows and dist.rank() == 0:
        saved = checkpoint.steps_in(out / "checkpoints")
        gone = [folder for folder in saved if is_abandoned(folder, rows)]
        if rest := [folder for folder in saved if folder not in gone]:
            write_whole(out / "checkpoints" / "latest", rest[-1].name)
        for folder in gone:
            checkpoint.remove(folder)
    dist.barrier()
    return rows


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a list of roll-backs; none where there is no such file."""
    return json.loads(file.read_text()) if file.is_file() else []


def is_abandoned(folder: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether a checkpoint comes after one that a roll-back went to, yet knows nothing of it.

    Of a damaged one that is not known, and not needed: it is not resumed from.
    """
    try:
        known = json.loads((folder / checkpoint.FACTS).read_text())["rollbacks"]
    except (OSError, ValueError, KeyError):
        return False
    return any(step_of(folder) > row["to"] and row not in known for row in rows)


def step_of(folder: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(folder.name.removeprefix("step_"))


def check_skipped_steps(
    task: job.Job, parts: Any, step: int, verdict_PK: list[list[float]]
) -> None:
    """Tell which of the steps up to `step` were skipped; Setback where too many were in a row."""
    if troubles := parts.guard.hear(verdict_PK, step):
        events.write_skipped_steps(task.out, troubles, parts.stream)
    if parts.guard.streak >= task.cfg.run.rollback_after:
        raise RollbackNeeded(step - parts.guard.streak + 1, step)


def plan_rollback(task: job.Job, parts: Any, setback: RollbackNeeded) -> None:
    """Write down where the run goes back to and what it leaves out; `resume` then does it.

    Left out is what the skipped steps read; where it went back to the same checkpoint before,
    everything since that one: then it was not those samples alone. RuntimeError where there is no
    checkpoint from before the skipped steps, or the run went back often enough.
    """
    done, most = parts.rollbacks, task.cfg.run.max_rollbacks
    steps = [step_of(p) for p in checkpoint.steps_in(task.out / "checkpoints")]
    to = dist.broadcast_object(max((step for step in steps if step < setback.first), default=None))
    if to is None or len(done) >= most:
        says = report(task.out, setback, "" if to is None else f"{len(done)}")
        events.end(task.out, "stopped", says, first=setback.first, last=setback.last)
        raise events.Ended(says)
    first = to + 1 if any(row["to"] == to for row in done) else setback.first
    span = [parts.stream.data_step(first), parts.stream.data_step(setback.last)]
    row = {"at": setback.last, "to": to, "left_out": span}
    if dist.rank() == 0:
        write_whole(task.out / FILE, json.dumps([*done, row], indent=1) + "\n")
    events.write(task.out, "rolled back", **row)
    console.say(f"steps {setback.first} to {setback.last} were all skipped: back to step {to}")
    dist.barrier()


def report(out: Path, setback: RollbackNeeded, times: str) -> str:
    """Why a run stops for good, and what to do."""
    but = (
        f"it went back {times} times already (--run.max_rollbacks)"
        if times
        else "there is no checkpoint from before to go back to (--run.save_minutes)"
    )
    return (
        f"steps {setback.first} to {setback.last} were all skipped, and {but};"
        f" {str(out / events.FILE)!r} says why and names the samples: mend or remove them, or lower"
        " --optim.lr or set --optim.clip in a fresh --out"
    )
