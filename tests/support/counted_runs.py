"""Train several short jobs and count, step by step, who makes the host read from the device.

Usage: `counted_runs.py PLAN.json`, a list of command lines; every run folder gets a `reads.json`: a
row for each step but the first (which allocates) and the last (which saves).
"""

import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import deepspeed
from host_reads import HostReads

import unic_ds
from unic_ds import config, train
from unic_ds.config import job
from unic_ds.config.args import parse
from unic_ds.engine import optim

ROOTS = {"ours": Path(unic_ds.__file__).parent, "deepspeed": Path(deepspeed.__file__).parent}


class Steps:
    """Counts between one call of `optim.apply`, with which a step begins, and the next."""

    def __init__(self, last: int):
        self.last, self.begun = last, 0
        self.counted: list[HostReads] = []
        self.open = ExitStack()
        self.apply = optim.apply

    def begin(self, optimizer, *given):
        """`optim.apply`, after the step before was closed."""
        self.open.close()
        self.begun += 1
        if 1 < self.begun < self.last:
            self.counted.append(self.open.enter_context(HostReads(ROOTS)))
        self.apply(optimizer, *given)

    def rows(self):
        """The counts as plain values."""
        return [row(reads) for reads in self.counted]


def row(reads: HostReads) -> dict[str, Counter[str]]:
    """Reads by owner, and operators.

    DeepSpeed moves tensors to the accelerator by its name, which is "cpu" where there is no other.
    """
    owners = ("ours", "backward", "deepspeed", "elsewhere")
    found = {owner: reads.of(owner) for owner in owners} | {"operators": reads.operators}
    found["deepspeed"] = Counter(
        {read: n for read, n in found["deepspeed"].items() if not read.endswith(": to")}
    )
    return found


def count(arguments: list[str]) -> None:
    """Train one job and write its `reads.json`."""
    task: job.Job = job.resolve(parse(arguments)[1])
    run: config.Run = task.cfg.run
    steps = Steps(run.stop_at)
    optim.apply = steps.begin
    code = train.main(arguments)
    optim.apply = steps.apply
    if code:
        sys.exit(code)
    (task.out / "reads.json").write_text(json.dumps(steps.rows(), indent=1))


if __name__ == "__main__":
    for line in json.loads(Path(sys.argv[1]).read_text()):
        count(line)
