"""A verb of unic_ds in a process of its own, which no launcher's rank is. Stdlib only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from unic_ds.files.printable import printable

ROOT = Path(__file__).resolve().parents[2]
ERROR = "unic_ds: error: "
"""Beginning of the line that reports an error."""
LONGEST = 4000
"""Characters that are shown of a line."""
END_S = 3.0
"""Seconds between SIGTERM and SIGKILL: fewer than `interrupt` leaves this process to end."""
SIGNAL_S = 1.0
"""Seconds in which a signal that ended the child reaches this process, too."""

LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
    *("CROSS_RANK", "MASTER_ADDR", "MASTER_PORT"),
)
"""Variables by which a launcher tells a rank its place; so do all of TORCHELASTIC_.

deepspeed's CROSS_SIZE stays: by it `node` knows who has set CUDA_VISIBLE_DEVICES.
"""


def run(words: Sequence[str], show: Callable[[str], None]) -> None:
    """Run a verb with its words, whose result is a file; `show` gets each line of its stderr.

    ValueError or RuntimeError, with the verb's own sentence, for its exit code 2 or another. Its
    processes are ended if this function is left by an exception, such as an interruption.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "unic_ds.cli", *words],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which ends it
    )
    error = ""
    try:
        assert process.stderr
        for line in process.stderr:
            if line.startswith(ERROR):
                error = printable(line.removeprefix(ERROR).rstrip("\n"), LONGEST)
            else:
                show(printable(line.rstrip("\n"), LONGEST))
        code = process.wait()
    finally:
        end(process)
    if code < 0:
        time.sleep(SIGNAL_S)
        raise RuntimeError(f"unic-ds {words[0]} was ended by {signal.Signals(-code).name}")
    if code == 2 and error:
        raise ValueError(error)
    if code:
        raise RuntimeError(error or f"unic-ds {words[0]} failed with exit code {code}; see above")


def environment() -> dict[str, str]:
    """This process's environment without a launcher's; what it can import, the child can, too."""
    elastic = [name for name in os.environ if name.startswith("TORCHELASTIC_")]
    left_out = {*LAUNCHER, *elastic}
    if elastic and os.environ.get("OMP_NUM_THREADS") == "1":
        left_out.add("OMP_NUM_THREADS")  # torchrun's, for ranks that share the cores
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    paths = (str(ROOT), os.environ.get("PYTHONPATH"), sys.path[0])
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def end(process: subprocess.Popen[str]) -> None:
    """End what is left of a child's processes, by SIGTERM, then by SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()
