"""Measure the cyclic garbage of steps: `step_garbage.py OUT [train's options]`.

Steps are those of unic_ds/training/loop.py, without any collection in between.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

from torch import Tensor

from unic_ds import dist
from unic_ds.config import args, job
from unic_ds.training import loop
from unic_ds.training.setup import build

WARM, STEPS = 3, 5  # the first steps leave what is made once


def main(out: Path, argv: list[str]) -> None:
    """Write the bytes of tensors in cycles, and how many objects of each kind, of all steps."""
    task = job.resolve(args.parse(argv)[1])
    dist.start()
    run, state = build(task, lambda *_: None)

    def steps(first: int, last: int) -> None:
        for state.step in range(first, last + 1):
            loop.train_step(run, state)

    steps(1, WARM)
    with loop.manual_garbage_collection():
        steps(WARM + 1, WARM + STEPS)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
    run.stream.close()
    nbytes = sum(found.nbytes for found in gc.garbage if isinstance(found, Tensor))
    kinds = Counter(type(found).__name__ for found in gc.garbage)
    out.write_text(json.dumps({"tensor_bytes": nbytes, "objects": dict(kinds.most_common(10))}))
    gc.set_debug(0)
    gc.garbage.clear()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
