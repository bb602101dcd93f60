"""`unic-ds doctor RUN`: what happened to a run, from what its folder keeps, and what to do."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import stat
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unic_ds.config import job, recipes
from unic_ds.files import open_regular
from unic_ds.files.documents import json_lines, parse_line
from unic_ds.files.printable import printable
from unic_ds.training import checkpoint, events, heartbeat, run_log
from unic_ds.training.heartbeat import Heartbeat

AGAIN = "start the same command again"
BAD = ("failed", "hung", "killed")
WATCHED_S = 9  # in which a rank of another machine beats, were it alive
HUNG = ("rank lost", "rank silent", "no progress")
TAIL, EVENTS = 1 << 20, 1 << 28
"""Bytes of the log's end, and of the longest file of events, that are read."""

SHOWN = 100
"""Reasons for skipped steps, and characters of each, that are shown."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a run folder says."""

    state: str  # finished, running, stopped, failed, hung, killed, or not begun
    says: str
    do: str
    step: int  # of the last log line
    checkpoints: dict[str, str]  # name -> what is wrong with it, or nothing
    notes: list[str]

    @property
    def good(self) -> bool:
        """Whether nothing needs mending."""
        whole = not self.checkpoints or not all(self.checkpoints.values())
        return self.state not in BAD and whole


def run(out: Path, *, hashes: bool, as_json: bool) -> int:
    """The verb: print what was found; exit code 1 where something went wrong."""
    try:
        found = examine(out, hashes=hashes)
    except OSError as error:  # another user's, or no name that a file can have
        raise ValueError(f"{str(out)!r} cannot be read ({error.strerror})") from None
    if as_json:
        print(json.dumps(asdict(found)))
        return 0 if found.good else 1
    print(f"{printable(out)}: {found.state}. {found.says}")
    for name, problem in found.checkpoints.items():
        print(f"  {name}: {problem or 'whole'}")
    for line in found.notes:
        print(f"  {line}")
    print(f"What to do: {found.do}.")
    return 0 if found.good else 1


def examine(out: Path, *, hashes: bool) -> Finding:
    """What a run folder says; ValueError where it is none. `hashes` reads checkpoints whole."""
    if not (out / "config.yaml").is_file():
        raise ValueError(
            f"{str(out)!r} is no run folder: it has no config.yaml; give a run's --out"
        )
    whole = recipes.read(out / "config.yaml")
    stages = job.staged(whole, out)
    done = [job.ended(folder) for _, folder in stages[:-1]]
    number = done.index(False) if False in done else len(done)
    cfg, folder = stages[number]
    of = f"Stage {number + 1} of {len(stages)}: " if len(stages) > 1 else ""
    step, saved = last_step(folder), checkpoint.steps_in(folder / "checkpoints")
    problems = {p.name: problem(p, hashes) for p in saved}
    told = read_events(folder)
    state, says = state_of(folder, int(cfg.optim.steps), told)
    good = [name for name, wrong in problems.items() if not wrong]
    return Finding(
        state=state,
        says=of + says,
        do=advice(state, good[-1] if good else "", STOPS.get(state, "")),
        step=step,
        checkpoints=problems,
        notes=notes(folder, job.stop_files(out, whole.run.stop_file), told),
    )


def last_step(out: Path) -> int:
    """The step of the last log line that has one, among the file's last `TAIL` bytes."""
    try:
        with open_regular(out / "log.jsonl") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL))
            lines = stream.read(TAIL).splitlines()
    except OSError:
        return 0
    steps = (run_log.step_of(row) for row in map(parse_line, reversed(lines)) if row is not None)
    return int(next((step for step in steps if step < math.inf), 0))


STOPS = {
    "hung": "look after the machine that is named (its kernel's log, its disks)",
    "failed": "mend what the message says",
}


def state_of(out: Path, steps: int, told: Told) -> tuple[str, str]:
    """State of a stage, of `steps` where they are known, and a sentence."""
    step = last_step(out)
    of = f"{step} of {steps}" if steps else str(step)
    if job.ended(out):
        return "finished", f"It trained {step} steps and exported its student."
    ranks = last_start(out)
    if locked(out) or any(alive(out, row) for row in ranks):
        written = (out / "log.jsonl").stat().st_mtime if step else time.time()
        return "running", f"Step {of} was logged {max(0, time.time() - written):.0f} s ago."
    if not ranks:
        return ("stopped", f"It was asked to stop, and did after step {of}.") if step else NOT_BEGUN
    verdict = out / heartbeat.FOLDER / f"verdict_{ranks[0].start}.json"
    if verdict.exists() and told.hung:
        return "hung", f"At step {of}: {told.hung}."
    if failed := [row for row in ranks if row.error]:
        who, phase, error = map(printable, (failed[0].who, failed[0].phase, failed[0].error))
        return "failed", f"{who} at '{phase}' of step {of}: {error}"
    last = max(ranks, key=lambda row: row.time)
    return "killed", (
        f"All ranks ended without a word; {printable(last.who)} was last at"
        f" '{printable(last.phase)}' of step"
        f" {last.step} (killed from outside: a time limit, a cancelled job, or a lost node)."
    )


NOT_BEGUN = "not begun", "It has not come to a first log line."


def last_start(out: Path) -> list[Heartbeat]:
    """The pulses of the last start that did not end cleanly, in rank order."""
    rows = heartbeat.read_all(out)
    newest = max(rows, key=lambda row: row.time, default=None)
    return [row for row in rows if newest and row.start == newest.start]


def alive(out: Path, row: Heartbeat) -> bool:
    """Whether a rank lives: its process is there, or, on another machine, it beats."""
    if heartbeat.near(row):
        return not heartbeat.has_exited(row)
    if row.rank or row.error:  # one of them tells for all
        return False
    time.sleep(WATCHED_S)
    now = heartbeat.read(heartbeat.file_of(out, row.rank))
    return now is not None and now.beat != row.beat


def locked(out: Path) -> bool:
    """Whether a process holds the run's lock."""
    try:
        with open_regular(out / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, no right to read it, or a file system without locks
        return False
    return False


def problem(folder: Path, hashes: bool) -> str:
    """What is wrong with a checkpoint by the sizes of its files, or by their hashes."""
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
class Told:
    """A summary of a run's events."""

    skipped: int = 0
    reasons: set[str] = field(default_factory=set)  # of the skipped steps
    returns: int = 0
    returned_to: str = ""  # the step, of the last time
    hung: str = ""  # the last sentence about ranks that did not get on
    odd: int = 0  # lines that are no events
    unread: str = ""  # why the file was not read

    def add(self, row: dict[str, Any] | None) -> None:
        """Take a line of the file, None for one that is no event."""
        event = row.get("event") if row else None
        if row is None or not isinstance(event, str):
            self.odd += 1
        elif event == "skipped":
            self.skipped += 1
            if len(self.reasons) < SHOWN:
                self.reasons.add(printable(row.get("why"), SHOWN))
        elif event == "rolled back":
            self.returns, self.returned_to = self.returns + 1, printable(row.get("to"), SHOWN)
        elif event in HUNG:
            self.hung = printable(row.get("says"))


def read_events(out: Path) -> Told:
    """The run's events, read in the memory of one line."""
    file, told = out / events.FILE, Told()
    if not file.exists():
        return told
    size = file.stat().st_size
    if size > EVENTS or not file.is_file():
        what = f"has {size / 1e6:.0f} MB" if file.is_file() else "is no file"
        told.unread = f"{events.FILE} {what} and was not read"
        return told
    for row in json_lines(file):
        told.add(row)
    return told


def advice(state: str, newest: str, first: str) -> str:
    """What to do now."""
    if state == "finished":
        return "nothing; the student is in student/"
    if state == "running":
        return "nothing, or touch its STOP file to have it save and stop"
    start = f"{AGAIN}; it {f'goes on from {newest}' if newest else 'begins at the first step'}"
    return f"{first}, then {start}" if first else start


def notes(out: Path, stops: list[Path], told: Told) -> list[str]:
    """What else is worth knowing."""
    found = [told.unread] if told.unread else []
    if told.odd:
        found.append(f"{told.odd} lines of {events.FILE} are no events")
    if odd := len(list(heartbeat.files(out))) - len(heartbeat.read_all(out)):
        found.append(f"{odd} files of {heartbeat.FOLDER}/ hold no heartbeat")
    name = printable(out / events.FILE)
    if told.skipped:
        why = ", ".join(sorted(told.reasons))
        found.append(f"{told.skipped} steps were skipped ({why}): {name} names them")
    if told.returns:
        found.append(f"it went back {told.returns} times, last to step {told.returned_to}")
    if not last_step(out) and (out / "log.jsonl").exists():
        found.append("log.jsonl has no line with a step")
    found += [
        f"{printable(file)} is there: a start would stop at once; remove it"
        for file in stops
        if job.kind_of(str(file))
    ]
    if any((out / "checkpoints").glob(".saving_*")):
        found.append("a save was cut short; the next one removes what it left")
    steps = checkpoint.steps_in(out / "checkpoints")
    if steps:
        size = sum(file.stat().st_size for file in steps[-1].rglob("*") if file.is_file())
        free = shutil.disk_usage(out).free
        if free < 2 * size:
            found.append(
                f"{free / 1e9:.1f} GB are free, a checkpoint has {size / 1e9:.1f}: free some"
            )
    if stacks := sorted((out / heartbeat.FOLDER).glob("stacks_*.txt")):
        where = printable(stacks[0].parent)
        found.append(f"where each rank's threads were: {where}/stacks_*.txt")
    return found
