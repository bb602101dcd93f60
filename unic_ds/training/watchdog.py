"""Watchdog of a run: if a rank dies, hangs or stalls, it aborts the run and names the rank.

A daemon thread of every rank writes a heartbeat and checks that of the next rank: a ring, so each
rank is watched whichever one stalls, at one small read per interval. Clocks of ranks are not
compared: what counts is whether a heartbeat changed while the reader's own thread ran. The first
rank that finds a fault writes the verdict file; every watchdog that reads it ends its process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from unic_ds.config import Run
from unic_ds.files import run_files
from unic_ds.process import entry_point, interrupt
from unic_ds.training import events, heartbeat
from unic_ds.training.heartbeat import Heartbeat

STALL_FACTORS = dict.fromkeys(("building", "resuming", "compiling", "saving"), 4) | dict.fromkeys(
    ("evaluating", "probing"), 12
)
"""Multiples of run.stall_timeout in phases that contain no other phase."""
BEATS_PER_TIMEOUT = 30  # heartbeats in run.hang_timeout
LOST_RANK_WORDS = ("gloo", "nccl", "connection", "peer")  # in errors of collectives
PACKAGE = Path(__file__).parent.parent
RESUME = "the run ends, and the same command resumes from its last checkpoint"


def new_start_id() -> str:
    """Id of one start of a run, for all of its ranks."""
    return uuid.uuid4().hex[:12]


def longest_timeout_s(run: Run) -> int:
    """Timeout of collectives in seconds: never shorter than those of the watchdog."""
    return max(1800, int(run.stall_timeout * max(STALL_FACTORS.values())))


class Watchdog:
    """Context manager of training: `set_phase` stores the rank's phase, a thread does the rest.

    A clean exit removes the rank's files.
    """

    def __init__(self, out: Path, run: Run, *, start: str, rank: int, world: int):
        self.out, self.run, self.rank, self.world = out, run, rank, world
        self.interval_s = 4.0
        if run.hang_timeout:
            self.interval_s = min(max(run.hang_timeout / BEATS_PER_TIMEOUT, 0.2), 4.0)
        self.heartbeat = heartbeat.create(start, rank)
        self.position = ("building", 0)  # phase and step
        self.phase_changes = 0
        self.neighbour: Heartbeat | None = None
        self.silent_s = 0.0  # since the neighbour's heartbeat changed
        self.verdict_file = out / run_files.HEARTBEATS / f"verdict_{start}.json"
        self.failed_file = out / run_files.HEARTBEATS / f"failed_{start}"  # rank that reports
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="heartbeat", daemon=True)

    def set_phase(self, phase: str, step: int) -> None:
        """Store that the rank is in `phase` of `step` from now on."""
        self.position = phase, step
        self.phase_changes += 1

    def __enter__(self) -> Self:
        (self.out / run_files.HEARTBEATS).mkdir(parents=True, exist_ok=True)
        self.write_heartbeat(0.0)
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # A failed save is an OSError, whatever caused it.
        cause = error.__cause__ or error if error else None
        if isinstance(cause, RuntimeError) and self.world > 1 and not self.failed_file.exists():
            self.abort_if_rank_lost(cause)
        self.stopped.set()
        self.thread.join()
        _, step = self.position
        refused = isinstance(error, ValueError) and entry_point.is_expected(error) and not step
        if refused:
            self.claim_failure()
        # A launcher ends the other ranks after one that was refused or failed, and reported it.
        followed = isinstance(error, KeyboardInterrupt) and self.failed_file.exists()
        if error and followed:
            entry_point.choose_reporter(error, reports=False)
        if error is None or refused or followed:
            self.remove_files()
            return
        self.record_failure(error)

    def record_failure(self, error: BaseException) -> None:
        """Record an exception in the heartbeat and, on the rank that reports it, as an event."""
        first = self.claim_failure()
        entry_point.choose_reporter(error, reports=first)
        summary = entry_point.summary(interrupt.cause(error))
        with suppress(OSError):
            self.write_heartbeat(0.0, error=summary)
        if first and not isinstance(error, events.RecordedFailure):
            phase, step = self.position
            events.record_failure(self.out, summary, step=step, phase=phase)

    def claim_failure(self) -> bool:
        """True on the one rank of a start that fails first; on the first rank if OUT is full."""
        try:
            self.failed_file.open("x").close()
        except FileExistsError:
            return False
        except OSError:
            return self.rank == 0
        return True

    def write_heartbeat(self, ran_s: float, error: str = "") -> None:
        """Write this rank's heartbeat, `ran_s` seconds after the last."""
        (phase, step), changes, last = self.position, self.phase_changes, self.heartbeat
        line = main_thread_line()
        # In a phase that contains no other phase, another source line is progress too.
        idle = changes == last.phase_changes and (
            phase not in STALL_FACTORS or line == last.source_line
        )
        self.heartbeat = replace(
            last,
            beat=last.beat + 1,
            step=step,
            phase=phase,
            phase_changes=changes,
            idle_s=round(last.idle_s + ran_s, 1) if idle else 0.0,
            source_line=line,
            error=error,
        )
        heartbeat.write(self.out, self.heartbeat)

    def remove_files(self) -> None:
        """Remove what this rank wrote; on rank 0 also what earlier starts left."""
        folder = self.out / run_files.HEARTBEATS
        files = [heartbeat.file_of(self.out, self.rank)]
        if self.rank == 0:
            others = (heartbeat.file_of(self.out, row.rank) for row in self.other_heartbeats())
            kept = {self.failed_file, *others}
            files = [file for file in folder.glob("*") if file not in kept]
        with suppress(OSError):
            for file in files:
                file.unlink(missing_ok=True)
            if not self.other_heartbeats():
                self.failed_file.unlink(missing_ok=True)
            folder.rmdir()  # fails until the last rank has left
            self.out.rmdir()  # fails if the run made more than this

    def watch(self) -> None:
        """Loop of the thread: write, then check the verdict, the next rank and the progress."""
        last = time.monotonic()
        while not self.stopped.wait(self.interval_s):
            now = time.monotonic()
            # Time for which this process itself was stopped does not count against the others.
            ran_s, last = min(now - last, 4 * self.interval_s), now
            with suppress(OSError):  # the file system may be unavailable for a while
                self.write_heartbeat(ran_s)
                self.exit_if_decided()
                self.check_neighbour(ran_s)
                self.check_progress()

    def check_neighbour(self, ran_s: float) -> None:
        """Abort the run if the next rank has exited or writes no heartbeat."""
        if self.world == 1:
            return
        file = heartbeat.file_of(self.out, (self.rank + 1) % self.world)
        found = heartbeat.read(file)
        if found is None and not file.exists():
            self.neighbour = None  # it has finished
        if found is None or found.start != self.heartbeat.start:
            return
        self.silent_s += ran_s
        if self.neighbour is None or found.beat != self.neighbour.beat:
            self.neighbour, self.silent_s = found, 0.0
        # A rank that finishes removes its file before it exits.
        if heartbeat.has_exited(found) and file.exists():
            self.abort("rank lost", [heartbeat.read(file) or found])
        elif self.run.hang_timeout and self.silent_s > self.run.hang_timeout:
            self.abort("rank silent", self.silent_ranks() or [found])

    def silent_ranks(self) -> list[Heartbeat]:
        """Ranks whose heartbeat does not change for three intervals."""
        before = {row.rank: row.beat for row in self.other_heartbeats()}
        time.sleep(3 * self.interval_s)
        return [row for row in self.other_heartbeats() if row.beat == before.get(row.rank)]

    def other_heartbeats(self) -> list[Heartbeat]:
        """Heartbeats of the other ranks of this start."""
        found = heartbeat.read_all(self.out)
        return [row for row in found if row.start == self.heartbeat.start and row.rank != self.rank]

    def check_progress(self) -> None:
        """Abort if no rank makes progress within the timeout; the first and last rank check."""
        limit_s, checkers = self.run.stall_timeout, (0, self.world - 1)
        if not limit_s or self.heartbeat.idle_s < limit_s or self.rank not in checkers:
            return
        rows = sorted([self.heartbeat, *self.other_heartbeats()], key=lambda row: row.rank)
        limit_s *= max(STALL_FACTORS.get(row.phase, 1) for row in rows)
        if min(row.idle_s for row in rows) >= limit_s:
            fewest = min(row.phase_changes for row in rows)
            behind = [row for row in rows if row.phase_changes == fewest]
            self.abort("no progress", behind, rows)

    def abort_if_rank_lost(self, error: RuntimeError) -> None:
        """End the process if `error` is that of a collective which has lost a rank."""
        if not any(word in str(error).lower() for word in LOST_RANK_WORDS):
            return
        if missing := [row for row in self.other_heartbeats() if heartbeat.has_exited(row)]:
            self.abort("rank lost", missing)
        if self.rank in (0, self.world - 1) and (missing := self.silent_ranks()):
            self.abort("rank silent", missing)
        time.sleep(4 * self.interval_s)  # if another rank decides, the thread ends this process

    def abort(
        self, event: str, culprits: list[Heartbeat], rows: list[Heartbeat] | None = None
    ) -> None:
        """Report the fault, once per job, and end this process; all others end likewise.

        A rank that failed with an exception has reported it already.
        """
        message = describe(event, culprits, rows or [], hang_timeout=self.run.hang_timeout)
        # If all ranks hang, each ends its own process.
        killed = culprits if len(culprits) < self.world else []
        try:
            with self.verdict_file.open("x") as file:
                file.write(json.dumps([heartbeat.to_json(row) for row in killed]))
        except FileExistsError:
            time.sleep(self.interval_s)  # it may be half written
            self.exit_if_decided()
        except OSError:  # no room: then each rank reports by itself
            pass
        facts = [
            {"rank": row.rank, "host": row.host, "pid": row.pid, "phase": row.phase}
            for row in culprits[:8]
        ]
        if not self.failed_file.exists():
            with suppress(OSError):
                events.append(self.out, event, step=culprits[0].step, says=message, ranks=facts)
            with suppress(OSError):
                os.write(2, f"unic_ds: error: {message}; {RESUME}\n".encode())
        self.exit_process(killed)

    def exit_if_decided(self) -> None:
        """End this process if another rank has written the verdict."""
        try:
            rows = list(map(heartbeat.from_json, json.loads(self.verdict_file.read_text())))
        except (OSError, ValueError):
            return
        self.exit_process([row for row in rows if row])

    def exit_process(self, culprits: list[Heartbeat]) -> None:
        """Write this process's stacks, end the culprits on this machine, and exit."""
        stacks = self.out / run_files.HEARTBEATS / f"stacks_{self.rank:05d}.txt"
        with suppress(OSError), stacks.open("w") as file:
            faulthandler.dump_traceback(file)
        others = [row for row in culprits if row.pid != os.getpid() and heartbeat.is_local(row)]
        # A stopped process that continues reads the verdict, and exits by itself.
        send_signal(signal.SIGCONT, others)
        last = time.monotonic() + 2 * self.interval_s + 1
        while time.monotonic() < last and not all(map(heartbeat.has_exited, others)):
            time.sleep(0.05)
        send_signal(signal.SIGKILL, others)
        os._exit(1)


def send_signal(number: signal.Signals, rows: list[Heartbeat]) -> None:
    """Send a signal to those of the ranks that have not exited."""
    for row in rows:
        if not heartbeat.has_exited(row):
            with suppress(OSError):
                os.kill(row.pid, number)


def describe(
    event: str, culprits: list[Heartbeat], rows: list[Heartbeat], *, hang_timeout: float
) -> str:
    """The sentence about a fault; `rows` are all ranks, if none of them makes progress."""
    first = culprits[0]
    more = f" and {len(culprits) - 1} more" if len(culprits) > 1 else ""
    ranks, position = first.label + more, f"in phase {first.phase!r} of step {first.step}"
    if first.error:  # its process may not have exited yet
        return f"{ranks} failed {position}: {first.error}"
    if event == "rank lost":
        return f"{ranks} was killed {position} (the kernel's log says whether memory ran out)"
    if event == "rank silent":
        return (
            f"{ranks} wrote no heartbeat for {hang_timeout:g} s and was last {position}:"
            " its process is stopped, or its machine is lost"
        )
    if 1 < len(culprits) == len(rows):
        return (
            f"none of the {len(rows)} ranks made progress for {first.idle_s:.0f} s {position}"
            f" ({first.label} at {first.source_line}): a collective, a GPU or the file system hangs"
        )
    message = (
        f"{ranks} made no progress for {first.idle_s:.0f} s {position} (at {first.source_line})"
    )
    others = Counter(row.phase for row in rows if row.phase_changes > first.phase_changes)
    waiting = ", ".join(f"{count} in phase {phase!r}" for phase, count in others.most_common())
    return f"{message}; the other ranks wait for it: {waiting}" if waiting else message


def main_thread_line() -> str:
    """file:line of this package that the main thread is in; empty if it is in none."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and not frame.f_code.co_filename.startswith(str(PACKAGE)):
        frame = frame.f_back
    if not frame:
        return ""
    return f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"
