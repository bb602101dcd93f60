"""Ends a run whose ranks wait for one that is dead, stopped or stuck, and says which one that is.

A daemon thread of every rank tells its pulse and feels that of the next rank: a ring, so that each
is watched whoever stalls, at one small read a beat. Nobody compares clocks: what counts is whether
a pulse changed while the reader's own thread ran. Whoever finds something wrong first says so in
one file; every thread that sees it ends its process.
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
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from unic_ds.config import Run
from unic_ds.process import entry_point, interrupt
from unic_ds.training import events, heartbeat
from unic_ds.training.heartbeat import Heartbeat

PATIENT = {"building": 4, "resuming": 4, "compiling": 4, "saving": 4, "evaluating": 12}
"""Times run.stall_timeout, in phases that have none inside; a probe is fitted in one line."""
BEATS = 30  # in run.hang_timeout
LOST = ("gloo", "nccl", "connection", "peer")  # words of a collective that lost a rank
OWN = Path(__file__).parent.parent
AGAIN = "the run ends, and the same command goes on from its last checkpoint"


def new_start_id() -> str:
    """A name for one start of a run, which its ranks share."""
    return uuid.uuid4().hex[:12]


def longest_timeout_s(run: Run) -> int:
    """What a collective may wait before torch ends it: never less than we do."""
    return max(1800, int(run.stall_timeout * max(PATIENT.values())))


class Watchdog:
    """Called with a phase and a step, it remembers them; the rest happens beside the run.

    Entered, it beats until the run's end; a clean one leaves no trace of it.
    """

    def __init__(self, out: Path, run: Run, *, start: str, rank: int, world: int):
        self.out, self.run, self.rank, self.world = out, run, rank, world
        self.every_s = min(max(run.hang_timeout / BEATS, 0.2), 4.0) if run.hang_timeout else 4.0
        self.told = heartbeat.own(start, rank)
        self.at = ("building", 0)
        self.moves = 0
        self.next: Heartbeat | None = None
        self.quiet_s = 0.0  # since the next rank's pulse changed
        self.verdict = out / heartbeat.FOLDER / f"verdict_{start}.json"
        self.failed = out / heartbeat.FOLDER / f"failed_{start}"  # the rank that reports made it
        self.left = threading.Event()
        self.thread = threading.Thread(target=self.beat, name="heartbeat", daemon=True)

    def __call__(self, phase: str, step: int) -> None:
        """From here on the rank is in `phase` of `step`."""
        self.at = phase, step
        self.moves += 1

    def __enter__(self) -> Self:
        (self.out / heartbeat.FOLDER).mkdir(parents=True, exist_ok=True)
        self.tell(0.0)
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # A failed save is an OSError, whatever it met.
        cause = error.__cause__ or error if error else None
        if isinstance(cause, RuntimeError) and self.world > 1 and not self.failed.exists():
            self.blame(cause)
        self.left.set()
        self.thread.join()
        refused = (
            isinstance(error, ValueError) and entry_point.is_expected(error) and not self.at[1]
        )
        if refused:
            self.first_to_fail()
        # A launcher ends the other ranks after one that was refused or failed, and reported it.
        followed = isinstance(error, KeyboardInterrupt) and self.failed.exists()
        if error and followed:
            entry_point.choose_reporter(error, unless=False)
        if error is None or refused or followed:
            self.clear()
            return
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Leave a record of an exception, and settle which of the ranks reports it."""
        first = self.first_to_fail()
        entry_point.choose_reporter(error, unless=first)
        says = entry_point.summary(interrupt.cause(error))
        with suppress(OSError):
            self.tell(0.0, error=says)
        if first and not isinstance(error, events.Ended):
            phase, step = self.at
            events.failed(self.out, says, step=step, phase=phase)

    def first_to_fail(self) -> bool:
        """True on the one rank of a start that fails first; on the first rank where OUT is full."""
        try:
            self.failed.open("x").close()
        except FileExistsError:
            return False
        except OSError:
            return self.rank == 0
        return True

    def tell(self, ran_s: float, error: str = "") -> None:
        """Write this rank's pulse, `ran_s` seconds after the last."""
        (phase, step), moves, told, where = self.at, self.moves, self.told, whereabouts()
        # What is patient has no phases inside: there another line is a sign of getting on.
        still = moves == told.moves and (phase not in PATIENT or where == told.where)
        self.told = replace(
            told,
            beat=told.beat + 1,
            step=step,
            phase=phase,
            moves=moves,
            idle_s=round(told.idle_s + ran_s, 1) if still else 0.0,
            where=where,
            error=error,
        )
        heartbeat.write(self.out, self.told)

    def clear(self) -> None:
        """Remove what this rank wrote; the first one also what earlier starts left."""
        folder = self.out / heartbeat.FOLDER
        files = [heartbeat.file_of(self.out, self.rank)]
        if self.rank == 0:
            kept = {self.failed, *(heartbeat.file_of(self.out, row.rank) for row in self.others())}
            files = [file for file in folder.glob("*") if file not in kept]
        with suppress(OSError):
            for file in files:
                file.unlink(missing_ok=True)
            if not self.others():
                self.failed.unlink(missing_ok=True)
            folder.rmdir()  # fails until the last has left
            self.out.rmdir()  # fails where the run made more than this

    def beat(self) -> None:
        """What the thread does."""
        last = time.monotonic()
        while not self.left.wait(self.every_s):
            now = time.monotonic()
            # While this process was stopped itself, the others are not to blame.
            ran_s, last = min(now - last, 4 * self.every_s), now
            with suppress(OSError):  # a file system that is away for a while
                self.tell(ran_s)
                self.obey()
                self.feel(ran_s)
                self.judge_stall()

    def feel(self, ran_s: float) -> None:
        """Look after the next rank."""
        if self.world == 1:
            return
        file = heartbeat.file_of(self.out, (self.rank + 1) % self.world)
        seen = heartbeat.read(file)
        if seen is None and not file.exists():
            self.next = None  # it is done
        if seen is None or seen.start != self.told.start:
            return
        self.quiet_s += ran_s
        if self.next is None or seen.beat != self.next.beat:
            self.next, self.quiet_s = seen, 0.0
        if (
            heartbeat.has_exited(seen) and file.exists()
        ):  # a rank that is done removes it before it goes
            self.end("rank lost", [heartbeat.read(file) or seen])
        elif self.run.hang_timeout and self.quiet_s > self.run.hang_timeout:
            self.end("rank silent", self.silent() or [seen])

    def silent(self) -> list[Heartbeat]:
        """Ranks whose pulse does not change for a few beats."""
        before = {row.rank: row.beat for row in self.others()}
        time.sleep(3 * self.every_s)
        return [row for row in self.others() if row.beat == before.get(row.rank)]

    def others(self) -> list[Heartbeat]:
        """The pulses of this start, without our own."""
        found = heartbeat.read_all(self.out)
        return [row for row in found if row.start == self.told.start and row.rank != self.rank]

    def judge_stall(self) -> None:
        """Whether nobody has moved for too long; the first and the last rank look."""
        limit, ends = self.run.stall_timeout, (0, self.world - 1)
        if not limit or self.told.idle_s < limit or self.rank not in ends:
            return
        rows = sorted([self.told, *self.others()], key=lambda row: row.rank)
        limit *= max(PATIENT.get(row.phase, 1) for row in rows)
        if min(row.idle_s for row in rows) >= limit:
            least = min(row.moves for row in rows)
            self.end("no progress", [row for row in rows if row.moves == least], rows)

    def blame(self, error: RuntimeError) -> None:
        """End the process where `error` is what a collective says when another rank is gone."""
        if not any(word in str(error).lower() for word in LOST):
            return
        if missing := [row for row in self.others() if heartbeat.has_exited(row)]:
            self.end("rank lost", missing)
        if self.rank in (0, self.world - 1) and (missing := self.silent()):
            self.end("rank silent", missing)
        time.sleep(4 * self.every_s)  # another may know better: our thread then ends us here

    def end(
        self, event: str, culprits: list[Heartbeat], rows: list[Heartbeat] | None = None
    ) -> None:
        """Report what is wrong, once a job, and end this process, as all the others will.

        A rank that failed with an exception has reported it already.
        """
        says = sentence(event, culprits, rows or [], self.run.hang_timeout)
        blamed = culprits if len(culprits) < self.world else []  # where all hang, each ends itself
        try:
            with self.verdict.open("x") as file:
                file.write(json.dumps([asdict(row) for row in blamed]))
        except FileExistsError:
            time.sleep(self.every_s)  # it may be being written
            self.obey()
        except OSError:  # no room: then each says it for itself
            pass
        facts = [{k: asdict(row)[k] for k in ("rank", "host", "pid", "phase")} for row in culprits]
        if not self.failed.exists():
            with suppress(OSError):
                events.append(self.out, event, step=culprits[0].step, says=says, ranks=facts[:8])
            with suppress(OSError):
                os.write(2, f"unic_ds: error: {says}; {AGAIN}\n".encode())
        self.leave(blamed)

    def obey(self) -> None:
        """End this process where another has said that the run is over."""
        try:
            culprits = [Heartbeat(**row) for row in json.loads(self.verdict.read_text())]
        except (OSError, ValueError):
            return
        self.leave(culprits)

    def leave(self, culprits: list[Heartbeat]) -> None:
        """End the culprits among this machine's ranks, and this process at once."""
        with (
            suppress(OSError),
            (self.out / heartbeat.FOLDER / f"stacks_{self.rank:05d}.txt").open("w") as file,
        ):
            faulthandler.dump_traceback(file)
        others = [row for row in culprits if row.pid != os.getpid() and heartbeat.near(row)]
        send(signal.SIGCONT, others)  # a stopped one then reads the verdict, and leaves by itself
        last = time.monotonic() + 2 * self.every_s + 1
        while time.monotonic() < last and not all(map(heartbeat.has_exited, others)):
            time.sleep(0.05)
        send(signal.SIGKILL, others)
        os._exit(1)


def send(number: signal.Signals, rows: list[Heartbeat]) -> None:
    """Signal those of the ranks that are still there."""
    for row in rows:
        if not heartbeat.has_exited(row):
            with suppress(OSError):
                os.kill(row.pid, number)


def sentence(
    event: str, culprits: list[Heartbeat], rows: list[Heartbeat], hang_timeout: float
) -> str:
    """Who is wrong, and where; `rows` are all ranks that told, where nobody gets on."""
    first = culprits[0]
    more = f" and {len(culprits) - 1} more" if len(culprits) > 1 else ""
    who, at = first.who + more, f"at {first.phase!r} of step {first.step}"
    if first.error:  # it may still be on its way out
        return f"{who} failed {at}: {first.error}"
    if event == "rank lost":
        return f"{who} was killed {at} (the kernel's log says whether memory ran out)"
    if event == "rank silent":
        return (
            f"{who} gave no sign of life for {hang_timeout:g} s and was last {at}:"
            " its process is stopped, or its machine is lost"
        )
    if 1 < len(culprits) == len(rows):
        return (
            f"none of the {len(rows)} ranks got on for {first.idle_s:.0f} s {at} ({first.who} in"
            f" {first.where}): a collective, a GPU or the file system hangs"
        )
    says = f"{who} did not get on for {first.idle_s:.0f} s {at} (in {first.where})"
    others = Counter(row.phase for row in rows if row.moves > first.moves)
    waits = ", ".join(f"{count} at {phase!r}" for phase, count in others.most_common())
    return f"{says}; the others wait for it: {waits}" if waits else says


def whereabouts() -> str:
    """The line of ours that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and not frame.f_code.co_filename.startswith(str(OWN)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(OWN)}:{frame.f_lineno}" if frame else ""
