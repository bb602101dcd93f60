"""`unic-ds doctor RUN`: state of a run, read from its folder, and what to do about it."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from unic_ds.config import extension, job, recipes
from unic_ds.files import open_regular, run_files, run_lock
from unic_ds.files.documents import json_lines, parse_line
from unic_ds.files.printable import printable
from unic_ds.process import console
from unic_ds.report.event_words import HUNG
from unic_ds.training import checkpoint, heartbeat, run_log
from unic_ds.training.heartbeat import Heartbeat

RESTART = "start the same command again"
BAD = ("failed", "hung", "killed")
WATCHED_S = 9  # a rank of another machine writes a heartbeat within this time, if it runs
TAIL, EVENTS = 1 << 20, 1 << 28
"""Bytes that are read of the log's end, and of the longest file of events."""

SHOWN = 100
"""Reasons for skipped steps, and characters of each, that are shown."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """State of a run folder, and what to do about it."""

    state: str  # finished, running, stopped, failed, hung, killed, or not begun
    says: str
    do: str
    step: int  # of the last log line
    checkpoints: dict[str, str]  # name -> its fault, or empty
    notes: list[str]

    @property
    def good(self) -> bool:
        """True if the run needs no repair."""
        resumable = not self.checkpoints or not all(self.checkpoints.values())
        return self.state not in BAD and resumable


def run(out: Path, *, hashes: bool, as_json: bool) -> int:
    """Run the verb: print the finding; exit code 1 if something went wrong."""
    try:
        found = examine(out, hashes=hashes)
    except OSError as error:  # another user's, or no name that a file can have
        raise ValueError(f"{str(out)!r} cannot be read ({error.strerror})") from None
    if as_json:
        console.say(json.dumps(asdict(found)))
        return 0 if found.good else 1
    console.say(f"{printable(out)}: {found.state}. {found.says}")
    for name, problem in found.checkpoints.items():
        console.say(f"  {name}: {problem or 'intact'}")
    for line in found.notes:
        console.say(f"  {line}")
    console.say(f"What to do: {found.do}.")
    return 0 if found.good else 1


def examine(out: Path, *, hashes: bool) -> Finding:
    """The finding about a run folder; ValueError if it is none. `hashes` verifies SHA-256 too."""
    if not (out / "config.yaml").is_file():
        raise ValueError(
            f"{str(out)!r} is no run folder: it has no config.yaml; give a run's --out"
        )
    parent = recipes.read(out / "config.yaml")
    stages = job.staged(parent, out)
    done = [job.ended(folder) for _, folder in stages[:-1]]
    number = done.index(False) if False in done else len(done)
    cfg, folder = stages[number]
    position = f"Stage {number + 1} of {len(stages)}: " if len(stages) > 1 else ""
    step, saved = last_step(folder), extension.steps_in(folder / "checkpoints")
    problems = {p.name: problem(p, hashes) for p in saved}
    history = read_events(folder)
    state, sentence = state_of(folder, int(cfg.optim.steps), history)
    good = [name for name, wrong in problems.items() if not wrong]
    return Finding(
        state=state,
        says=position + sentence,
        do=advice(state, good[-1] if good else "", STOPS.get(state, "")),
        step=step,
        checkpoints=problems,
        notes=notes(folder, job.stop_files(out, parent.run.stop_file), history),
    )


def last_step(out: Path) -> int:
    """The step of the last log line that has one, among the file's last `TAIL` bytes."""
    try:
        with open_regular(out / run_files.LOG) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL))
            lines = stream.read(TAIL).splitlines()
    except OSError:
        return 0
    steps = (run_log.step_of(row) for row in map(parse_line, reversed(lines)) if row is not None)
    return int(next((step for step in steps if step < math.inf), 0))


STOPS = {
    "hung": "check the machine that is named (its kernel's log, its disks)",
    "failed": "fix the error of the message",
}


def state_of(out: Path, steps: int, history: History) -> tuple[str, str]:
    """(state, sentence) of a stage of `steps` optimiser steps; 0 if they are not known."""
    step = last_step(out)
    progress = f"{step} of {steps}" if steps else str(step)
    if job.ended(out):
        return "finished", f"It trained {step} steps and exported its student."
    ranks = last_start(out)
    if run_lock.is_held(out) or any(is_running(out, row) for row in ranks):
        written = (out / run_files.LOG).stat().st_mtime if step else time.time()
        return "running", f"Step {progress} was logged {max(0, time.time() - written):.0f} s ago."
    if not ranks:
        return ("stopped", f"It stopped on request after step {progress}.") if step else NOT_BEGUN
    verdict = out / run_files.HEARTBEATS / f"verdict_{ranks[0].start}.json"
    if verdict.exists() and history.hung:
        return "hung", f"At step {progress}: {history.hung}."
    if failed := [row for row in ranks if row.error]:
        rank, phase, error = map(printable, (failed[0].label, failed[0].phase, failed[0].error))
        return "failed", f"{rank} failed in phase '{phase}' of step {progress}: {error}"
    last = max(ranks, key=lambda row: row.time)
    return "killed", (
        f"All ranks ended without an error message; {printable(last.label)} was last in phase"
        f" '{printable(last.phase)}' of step"
        f" {last.step} (killed from outside: a time limit, a cancelled job, or a lost node)."
    )


NOT_BEGUN = "not begun", "It has not written a first log line."


def last_start(out: Path) -> list[Heartbeat]:
    """Heartbeats of the last start that did not end cleanly, in rank order."""
    rows = heartbeat.read_all(out)
    newest = max(rows, key=lambda row: row.time, default=None)
    return [row for row in rows if newest and row.start == newest.start]


def is_running(out: Path, row: Heartbeat) -> bool:
    """True if a rank's process exists or, on another machine, writes heartbeats."""
    if heartbeat.is_local(row):
        return not heartbeat.has_exited(row)
    if row.rank or row.error:  # rank 0 is enough
        return False
    time.sleep(WATCHED_S)
    now = heartbeat.read(heartbeat.file_of(out, row.rank))
    return now is not None and now.beat != row.beat


def problem(folder: Path, hashes: bool) -> str:
    """The fault of a checkpoint by the sizes of its files, or by their hashes; or empty."""
    if hashes:
        return checkpoint.verify(folder)
    expected = checkpoint.read_manifest(folder)
    if not expected:
        return f"no readable {checkpoint.MANIFEST}"
    for name, facts in sorted(expected.items()):
        try:
            found = (folder / name).stat()
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            return f"{printable(name)} is missing"
        if not stat.S_ISREG(found.st_mode):
            return f"{printable(name)} is no file"
        if found.st_size != facts["bytes"]:
            return f"{printable(name)} has {found.st_size} bytes, not {facts['bytes']}"
    return ""


@dataclass(kw_only=True)
class History:
    """Summary of a run's events."""

    skipped_steps: int = 0
    skip_reasons: set[str] = field(default_factory=set)
    rollbacks: int = 0
    rolled_back_to: str = ""  # step of the last roll-back
    hung: str = ""  # the last sentence about a rank that was lost, silent or stalled
    invalid_lines: int = 0
    unread: str = ""  # reason why the file was not read

    def add(self, row: Mapping[str, object] | None) -> None:
        """Count a line of the file; None for one that is no event."""
        event = row.get("event") if row else None
        if row is None or not isinstance(event, str):
            self.invalid_lines += 1
        elif event == "skipped":
            self.skipped_steps += 1
            if len(self.skip_reasons) < SHOWN:
                self.skip_reasons.add(printable(row.get("why"), SHOWN))
        elif event == "rolled back":
            self.rollbacks += 1
            self.rolled_back_to = printable(row.get("to"), SHOWN)
        elif event in HUNG:
            self.hung = printable(row.get("says"))


def read_events(out: Path) -> History:
    """Summary of events.jsonl, read in the memory of one line."""
    file, history = out / run_files.EVENTS, History()
    if not file.exists():
        return history
    size = file.stat().st_size
    if size > EVENTS or not file.is_file():
        fault = f"has {size / 1e6:.0f} MB" if file.is_file() else "is no file"
        history.unread = f"{run_files.EVENTS} {fault} and was not read"
        return history
    for row in json_lines(file):
        history.add(row)
    return history


def advice(state: str, newest: str, first: str) -> str:
    """The next thing to do: `first`, then a start from the checkpoint `newest`, if there is one."""
    if state == "finished":
        return "nothing; the student is in student/"
    if state == "running":
        return "nothing; to have it save and stop, touch its STOP file"
    start = f"{RESTART}; it {f'resumes from {newest}' if newest else 'begins at the first step'}"
    return f"{first}, then {start}" if first else start


def notes(out: Path, stops: list[Path], history: History) -> list[str]:
    """Further remarks about a run folder."""
    found = [history.unread] if history.unread else []
    if history.invalid_lines:
        found.append(f"{history.invalid_lines} lines of {run_files.EVENTS} are no events")
    if invalid := len(heartbeat.files(out)) - len(heartbeat.read_all(out)):
        found.append(f"{invalid} files of {run_files.HEARTBEATS}/ hold no heartbeat")
    name = printable(out / run_files.EVENTS)
    if history.skipped_steps:
        why = ", ".join(sorted(history.skip_reasons))
        found.append(f"{history.skipped_steps} steps were skipped ({why}): {name} names them")
    if history.rollbacks:
        found.append(
            f"it rolled back {history.rollbacks} times, last to step {history.rolled_back_to}"
        )
    if not last_step(out) and (out / run_files.LOG).exists():
        found.append("log.jsonl has no line with a step")
    found += [
        f"{printable(file)} exists: a start would stop at once; remove it"
        for file in stops
        if job.kind_of(str(file))
    ]
    if any((out / "checkpoints").glob(".saving_*")):
        found.append("a save was interrupted; the next one removes its leftovers")
    steps = extension.steps_in(out / "checkpoints")
    if steps:
        size = sum(file.stat().st_size for file in steps[-1].rglob("*") if file.is_file())
        free = shutil.disk_usage(out).free
        if free < 2 * size:
            found.append(
                f"{free / 1e9:.1f} GB are free, a checkpoint has {size / 1e9:.1f}: free some"
            )
    if stacks := sorted((out / run_files.HEARTBEATS).glob("stacks_*.txt")):
        folder = printable(stacks[0].parent)
        found.append(f"stacks of each rank's threads: {folder}/stacks_*.txt")
    return found
