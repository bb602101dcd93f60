"""Ranks forked from one process that has imported what a rank imports.

Each is a process with an environment, signals and an exit code of its own, and runs its script as
`__main__`, as under a launcher; only the imports, longer than most of these runs, are paid once.
Tests of what a launcher does start the launcher.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

IMPORTED = (
    "pytest",
    "unic_ds.train",
    "unic_ds.training.loop",
    "unic_ds.evaluate.registry",
    "unic_ds.planning.trace",
    "unic_ds.teachers.teacher_set",
    "unic_ds.data.dali_decoder",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.figure",
    "torch.utils.tensorboard",
)


class Forked(NamedTuple):
    """A command for so many ranks: a script and its words."""

    ranks: int
    words: list[str]


ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""What an import reads: every rank says the same."""


class Ranks:
    """A launch, with what the tests use of subprocess.Popen."""

    def __init__(self, command: Forked, env: dict[str, str], cwd: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        self.printed = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 (closed with this object)
        arguments = (command, env | ENVIRONMENT, str(cwd), self.printed.name)
        self.process = context.Process(target=lead, args=arguments)
        before = dict(os.environ)
        os.environ |= ENVIRONMENT  # the first launch starts the process that all are forked from
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("ranks", timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.printed.read(), None

    def ranks(self) -> list[int]:
        """Process ids of several ranks, as far as they have begun."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except OSError:
            return []  # it has ended
        return [int(pid) for pid in children.split()]

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def lead(command: Forked, env: dict[str, str], cwd: str, printed: str) -> None:
    """Act as a launcher: start the ranks, pass signals on, end the others when one fails."""
    os.setsid()
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for out in (1, 2):
        os.dup2(file, out)
    os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if command.ranks == 1:
        main(command.words)
    ranks = {follow(rank, command) for rank in range(command.ranks)}

    def tell(number: int, _: object) -> None:
        for rank in ranks:
            os.kill(rank, number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, tell)
    code = 0
    while ranks:
        rank, status = os.wait()
        ranks.discard(rank)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            tell(signal.SIGKILL, None)
    os._exit(code % 256)


def follow(rank: int, command: Forked) -> int:
    """Fork one rank of a node; its process id."""
    pid = os.fork()
    if not pid:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        count = str(command.ranks)
        os.environ |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        main(command.words)
    return pid


def main(words: list[str]) -> None:
    """Be `python SCRIPT ...`; never returns."""
    code = 1
    try:
        sys.argv = words
        found = [where for where in os.environ.get("PYTHONPATH", "").split(":") if where]
        sys.path[:1] = [str(Path(words[0]).parent), *found]
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
