"""What a run under ZeRO-3 holds after every eighth step: `steady_memory.py OUT [train's options]`.

The loop is that of unic_ds/train.py, with teachers beside it and the student asked without
gradients in between, as an evaluation does.
"""

import json
import resource
import sys
from pathlib import Path

import torch
from held_memory import held

from unic_ds import dist, entry, job
from unic_ds.loss import distill_loss
from unic_ds.ops import KERNELS
from unic_ds.parts import build
from unic_ds.train import uniforms

EVERY = 8


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(out: Path, argv: list[str]) -> None:
    """Write a row of (tensors' bytes, process's bytes) for every eighth step."""
    task = job.resolve(entry.parse(argv)[1])
    dist.start()
    cfg, parts, rows = task.cfg, build(task), []
    for step in range(1, cfg.optim.steps + 1):
        batch = next(parts.stream)
        drop_TB, path_BK = uniforms(cfg, step, batch.position_B, parts.engine)
        target = parts.teachers(batch.images, batch.beside)
        pred = parts.engine(batch.images[cfg.student.size], path_BK)
        loss, _ = distill_loss(
            pred,
            target,
            drop_TB,
            loss=cfg.loss,
            balance=parts.balance,
            distances=cfg.distances,
            everyone=dist.gather_batch,
            ops=KERNELS[cfg.kernels],
        )
        parts.guard.see(loss)
        parts.engine.backward(loss)
        parts.engine.step()
        taken = parts.guard.close()
        parts.teachers.track(0.1, taken)
        parts.balance.track(taken)
        if step % EVERY == 0:
            parts.guard.verdicts()  # as at a log line
            with torch.no_grad():
                parts.engine(batch.images[cfg.student.size], path_BK)
            del batch, target, pred, loss, drop_TB, path_BK
            rows.append((held(), resident()))
    parts.stream.close()
    out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
