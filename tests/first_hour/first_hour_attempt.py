"""A check of the first hour while it runs: its commands and time, what they print, the plan."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import first_hour_commands as commands
from first_hour_commands import Clock, Failed, Late
from first_hour_report import command_line


class Skip(Exception):
    """Raised if something that a check needs is missing; the text is the reason."""


class Found(NamedTuple):
    """Measurements of a check that passed."""

    figure: str = ""
    expected: str = ""
    data: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Session:
    """State that the checks share: machine, folder, time, and measurements so far."""

    machine: dict[str, Any]
    out: Path
    clock: Clock
    minutes: float = 10.0
    peaks: dict[str, float] = field(default_factory=dict)  # kind -> the best value measured
    plans: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    shares: dict[str, float | None] = field(default_factory=dict)  # of the data sheet's peaks

    @property
    def gpus(self) -> int:
        """GPUs that torch sees."""
        return len(self.machine["gpus"])

    @property
    def over(self) -> str:
        """The reason of checks that are not run in time."""
        return f"the {self.minutes:g} minutes are over"


class Attempt:
    """One check while it runs: its commands, their output, and the time that it has."""

    def __init__(self, session: Session, name: str, limit: float):
        self.session = session
        self.clock = Clock(min(session.clock.end, time.monotonic() + limit))
        self.commands: list[str] = []
        self.output = ""
        self.log = session.out / "logs" / f"{name}.txt"
        self.folder = session.out / "work" / name
        for folder in (self.log.parent, self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)

    def python(self, *words: object, codes: Sequence[int] = (0,)) -> str:
        """Output of this Python on `words`; Failed for an exit code that is not of `codes`."""
        command = [sys.executable, *map(str, words)]
        self.commands.append(command_line(command))
        env = commands.environment(gpu=bool(self.session.gpus))
        try:
            code, output = commands.run(command, self.log, limit=self.clock.left, env=env)
        finally:
            self.output = self.log.read_text(errors="replace")
        if code not in codes:
            raise Failed(f"exit code {code}: {commands.reason_in(output)}")
        return output

    def images(self, count: int) -> Path:
        """A folder of JPEG files, made once for all checks."""
        folder = self.session.out / "work" / f"images_{count}"
        words = ("tests/first_hour/first_hour_parts.py", "images", folder / "train", count)
        if (folder / "done").is_file():
            self.commands.append(command_line([sys.executable, *map(str, words)]))
        else:
            self.python(*words)
            (folder / "done").touch()
        return folder / "train"

    def forget(self) -> None:
        """Delete what the check wrote for itself: a run's checkpoints are gigabytes."""
        shutil.rmtree(self.folder, ignore_errors=True)


def planned(attempt: Attempt, given: dict[str, Any], count: int = 1) -> dict[str, Any]:
    """The plan of a run with these options on `count` such devices.

    {"problem": reason} where there is none.
    """
    session = attempt.session
    words = options(given)
    key = (*words, str(count))
    if key not in session.plans:
        try:
            gpu = described_gpu(session)
            more = ("--gpus", count, "--gpu", gpu, "--json")
            output = attempt.python("-m", "unic_ds.cli", "plan", *words, *more, codes=(0, 1))
            session.plans[key] = last_json(output)[-1]
        except Late:
            raise
        except (Failed, Skip) as error:
            session.plans[key] = {"problem": f"no plan: {error}"}
    return session.plans[key]


def described_gpu(session: Session) -> str:
    """The planner's name of the GPU, or a file of the peaks that were measured."""
    if name := session.machine["plan_gpu"]:
        return str(name)
    if not {"matmul", "memory"} <= session.peaks.keys():
        raise Skip("the planner does not know this device, and its peaks were not measured")
    memory = session.machine["gpus"][0]["memory_gb"] if session.gpus else 16
    known = {"name": "measured", "memory_gb": memory, "tflops": session.peaks["matmul"]}
    known |= {"memory_gb_s": session.peaks["memory"], "node_gb_s": 100, "net_gb_s": 25}
    file = session.out / "work" / "gpu.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in known.items()))
    return str(file)


def compared(made: dict[str, Any], part: str, name: str) -> str:
    """Time that the plan gives a part of the step: its row `name`, or rows that begin with it."""
    if problem := made.get("problem"):
        return str(problem)
    found = [
        seconds
        for row, seconds in made.get("seconds", {}).items()
        if row == name or row.startswith(f"{name} ")
    ]
    return f"planner: {part} {sum(found) * 1e3:.0f} ms" if found else f"the plan has no {part}"


def options(values: dict[str, Any]) -> list[str]:
    """Words of a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def every_json(output: str) -> list[dict[str, Any]]:
    """The JSON objects among an output's lines."""
    return [found for found in jsons(output) if isinstance(found, dict)]


def last_json(output: str) -> Any:
    """The last JSON object or list among an output's lines; Failed if there is none."""
    for found in reversed(list(jsons(output))):
        return found
    raise Failed(f"it printed no JSON: {commands.reason_in(output)}")


def jsons(output: str) -> Iterator[Any]:
    """JSON objects and lists, a line each."""
    for line in output.splitlines():
        if line.startswith(("{", "[")):
            try:
                yield json.loads(line)
            except ValueError:
                continue
