"""Votes of the ranks, after each optimiser step, on stopping the run and on saving."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as td

from unic_ds.dist.collectives import all_reduce_in_background
from unic_ds.dist.ranks import rank
from unic_ds.process import interrupt


class Agreed(NamedTuple):
    """Decision of all ranks after a step."""

    stop: bool  # save, and end the run
    save: bool  # save at the next log line


class StepVotes:
    """Decides after each step if the run stops and if it saves; the same on all ranks.

    A signal to any rank stops the run, and so does a file that rank 0 finds. Rank 0 votes for a
    save once `save_s` seconds have passed since the last (0: never). Votes are summed while the
    next step runs, so no rank waits for them.
    """

    SIGNALS = interrupt.SIGNALS

    def __init__(self, *files: Path, save_s: float = 0.0):
        self.files, self.signal, self.save_s = files, 0, save_s
        self.saved_at, self.outdated = time.monotonic(), False
        # On the CPU and read through NumPy, which costs less than an operator of torch.
        self.votes = torch.zeros(2)
        self.stop_save = self.votes.numpy()
        self.reduction: td.Work | None = None
        interrupt.handle(self.on_signal)

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Store a signal; repeated ones change nothing.

        A launcher forwards signals that the terminal or Slurm has sent to the ranks as well (a
        Ctrl-C arrives as SIGINT and SIGTERM under deepspeed, as two SIGINT under torchrun): these
        must not end a rank while it saves. SIGKILL and SIGQUIT (Ctrl-\\) end a rank at once.
        """
        if not self.signal and rank() == 0:
            name = signal.Signals(number).name
            with suppress(OSError):  # not print: the signal may have interrupted one
                os.write(2, f"unic_ds: {name}: the run saves and stops after this step\n".encode())
        self.signal = number

    def close(self) -> None:
        """Let signals end the process again; Interrupted if one came after the last step."""
        interrupt.install()
        if self.signal:
            raise interrupt.Interrupted(self.signal)

    def saved(self) -> None:
        """Restart the clock after a save; every rank calls it, after the same step."""
        self.saved_at, self.outdated = time.monotonic(), True

    def agreed(self) -> Agreed:
        """Decision by the votes of the last call; every rank calls it at each step."""
        if self.reduction is not None:
            self.reduction.wait()
        stop, save = map(bool, self.stop_save)
        found = Agreed(stop, save and not self.outdated)  # a vote from before the last save
        self.outdated = False
        first = rank() == 0
        late = self.save_s and time.monotonic() - self.saved_at >= self.save_s
        self.stop_save[0] = bool(self.signal) or (first and any(map(Path.exists, self.files)))
        self.stop_save[1] = first and bool(late)
        self.reduction = all_reduce_in_background(self.votes)
        return found
