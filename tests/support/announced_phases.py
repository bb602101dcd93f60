"""Take steps and print the phases that they announce: `announced_phases.py [train's options]`.

Prints one JSON list of (phase, step).
"""

import json
import sys

from unic_ds import dist
from unic_ds.config import args, job
from unic_ds.training import loop
from unic_ds.training.run_dir import resume
from unic_ds.training.setup import build


def main(argv: list[str]) -> None:
    """Take the steps of a run, without log lines and checkpoints."""
    task = job.resolve(args.parse(argv)[1])
    dist.start()
    phases: list[tuple[str, int]] = []
    run, state = build(task, lambda phase, step: phases.append((phase, step)))
    resume(run, state)
    for state.step in range(1, run.last_step + 1):
        loop.train_step(run, state)
    run.stream.close()
    print(json.dumps(phases))


if __name__ == "__main__":
    main(sys.argv[1:])
