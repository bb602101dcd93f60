"""Records a ZeRO-3 run's memory after every eighth step: `steady_memory.py OUT [train's options]`.

Steps are those of unic_ds/training/loop.py, with teachers beside, and the student is asked without
gradients in between, as an evaluation does.
"""

import json
import resource
import sys
from pathlib import Path

import torch
from held_memory import held

from unic_ds import dist
from unic_ds.config import args, job
from unic_ds.training import loop
from unic_ds.training.setup import build

EVERY = 8


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(out: Path, argv: list[str]) -> None:
    """Write a row of (tensors' bytes, process's bytes) for every eighth step."""
    task = job.resolve(args.parse(argv)[1])
    dist.start()
    cfg, rows = task.cfg, []
    run, state = build(task, lambda *_: None)
    side = cfg.student.size
    image_B3HW = torch.zeros(cfg.optim.batch_size, 3, side, side, dtype=torch.uint8)
    for state.step in range(1, cfg.optim.steps + 1):
        loop.train_step(run, state)
        if state.step % EVERY == 0:
            state.guard.take_reasons()  # as at a log line
            with torch.no_grad():
                state.engine(image_B3HW)
            rows.append((held(), resident()))
    run.stream.close()
    out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
