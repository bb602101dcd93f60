"""After several skipped steps in a row, roll back to a checkpoint and skip the samples behind them.

OUT/rollbacks.json lists each roll-back: at which step, to the checkpoint of which step, and which
steps of the data order are skipped from then on. A roll-back writes it first, and every later
checkpoint has the same list, so that a kill at any moment loses none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from unic_ds import dist
from unic_ds.config import extension
from unic_ds.data import order
from unic_ds.files import remove_folder, run_files, write_atomic
from unic_ds.process import console
from unic_ds.training import checkpoint, events
from unic_ds.training.checkpoint import RollbackRow
from unic_ds.training.state import RunContext, TrainState

FILE = "rollbacks.json"


class RollbackNeeded(Exception):
    """Optimiser steps `first` to `last` were all skipped."""

    def __init__(self, first: int, last: int):
        super().__init__(first, last)
        self.first, self.last = first, last


def skipped_spans(rollbacks: list[RollbackRow]) -> order.Spans:
    """Spans of steps of the data order that are not read."""
    return order.joined((first, last) for first, last in (row["left_out"] for row in rollbacks))


def prune_abandoned(out: Path) -> list[RollbackRow]:
    """Remove checkpoints that roll-backs abandoned; the run's roll-backs, equal on all ranks."""
    rows = dist.on_rank_0(lambda: read(out / FILE))
    if rows and dist.rank() == 0:
        saved = extension.steps_in(out / "checkpoints")
        abandoned = [folder for folder in saved if is_abandoned(folder, rows)]
        if kept := [folder for folder in saved if folder not in abandoned]:
            write_atomic(out / "checkpoints" / "latest", kept[-1].name)
        for folder in abandoned:
            remove_folder(folder)
    dist.barrier()
    return rows


def read(file: Path) -> list[RollbackRow]:
    """The rows of a list of roll-backs; none if there is no such file."""
    return json.loads(file.read_text()) if file.is_file() else []


def is_abandoned(folder: Path, rows: list[RollbackRow]) -> bool:
    """True if a checkpoint is of a later step than a roll-back went to, and does not list it.

    False for a damaged one, which is not resumed from.
    """
    try:
        listed = json.loads((folder / checkpoint.FACTS).read_text())["rollbacks"]
    except (OSError, ValueError, KeyError):
        return False
    return any(step_of(folder) > row["to"] and row not in listed for row in rows)


def step_of(folder: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(folder.name.removeprefix("step_"))


def check_skipped_steps(
    run: RunContext, state: TrainState, reason_PK: Sequence[Sequence[float]]
) -> None:
    """Record which steps since the last log line were skipped, by the reasons of all ranks.

    RollbackNeeded if too many were skipped in a row.
    """
    guard, step = state.guard, state.step
    if skipped := guard.report(reason_PK, step):
        events.write_skipped_steps(run.out, skipped, run.stream)
    if guard.streak >= run.cfg.run.rollback_after:
        raise RollbackNeeded(step - guard.streak + 1, step)


def plan_rollback(run: RunContext, state: TrainState, needed: RollbackNeeded) -> None:
    """Record which checkpoint to load and which steps of the data order to skip; `resume` does it.

    The data of the skipped optimiser steps are skipped. If an earlier roll-back went to the same
    checkpoint, all data since that checkpoint are: those samples were not the only cause.
    RuntimeError if there is no checkpoint from before the skipped steps, or after
    run.max_rollbacks.
    """
    rows = state.rollbacks
    steps = [step_of(path) for path in extension.steps_in(run.out / "checkpoints")]
    to = dist.broadcast_object(max((step for step in steps if step < needed.first), default=None))
    if to is None or len(rows) >= run.cfg.run.max_rollbacks:
        reason = reason_to_stop(run.out, needed, rollbacks=None if to is None else len(rows))
        steps_skipped = {"first": needed.first, "last": needed.last}
        events.record_permanent_failure(run.out, "stopped", reason, **steps_skipped)
        raise events.RecordedFailure(reason)
    first = to + 1 if any(row["to"] == to for row in rows) else needed.first
    span = [run.stream.data_step(first), run.stream.data_step(needed.last)]
    row: RollbackRow = {"at": needed.last, "to": to, "left_out": span}
    if dist.rank() == 0:
        write_atomic(run.out / FILE, json.dumps([*rows, row], indent=1) + "\n")
    events.write(run.out, "rolled back", **row)
    console.say(f"steps {needed.first} to {needed.last} were all skipped: back to step {to}")
    dist.barrier()


def reason_to_stop(out: Path, needed: RollbackNeeded, *, rollbacks: int | None) -> str:
    """Sentence with the reason why a run stops after `rollbacks` roll-backs, and a remedy.

    `rollbacks` is None if there is no checkpoint to roll back to.
    """
    obstacle = (
        "there is no checkpoint from before to go back to (--run.save_minutes)"
        if rollbacks is None
        else f"it went back {rollbacks} times already (--run.max_rollbacks)"
    )
    return (
        f"steps {needed.first} to {needed.last} were all skipped, and {obstacle};"
        f" {str(out / run_files.EVENTS)!r} has reasons and samples: repair or remove them, or lower"
        " --optim.lr or set --optim.clip in a fresh --out"
    )
