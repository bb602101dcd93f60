"""Compares the trainer's loop with a bare DeepSpeed loop: `loop_overhead.py OPTIONS`.

One launch trains two students on the same images and teachers, in turns of a few steps: one by the
trainer's own loop, with guard, heartbeats, log and stop requests, the other by the loop of
DeepSpeed's manual. Medians of their turns are compared. Rank 0 prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from unic_ds import dist
from unic_ds.config import args, job
from unic_ds.engine import deepspeed_engine, optim
from unic_ds.losses.distill import distill_loss
from unic_ds.process import entry_point
from unic_ds.training import loop, setup
from unic_ds.training.state import RunContext, TrainState
from unic_kernels.ops import KERNELS

TURNS, STEPS = 8, 6  # the first step of a turn is not counted, nor the last, which saves


def ours(run: RunContext, state: TrainState, first: int, votes: dist.StepVotes) -> list[float]:
    """Seconds of steps of the trainer's loop, from the begin of each to that of the next."""
    cadence = replace(run.cfg.run, stop_at=first + STEPS - 1)
    cfg = replace(run.cfg, run=cadence)
    state.step = first - 1
    begins: list[float] = []
    apply = optim.apply

    def applying(*given: Any) -> Any:
        begins.append(time.perf_counter())
        return apply(*given)

    optim.apply = applying
    try:
        loop.train_loop(replace(run, job=replace(run.job, cfg=cfg)), state, votes)
    finally:
        optim.apply = apply
    return [end - begin for begin, end in pairwise(begins[1:])]


def bare(run: RunContext, state: TrainState, student: Any, first: int) -> list[float]:
    """Seconds of steps that do nothing but learn by the method."""
    cfg, seconds, taken = run.cfg, [], torch.tensor(True, device=dist.device())
    for step in range(first, first + STEPS):
        begun, state.step = time.perf_counter(), step
        optim.apply(student.optimizer, optim.learning_rate(step, cfg.optim, run.train.per_epoch))
        resolution = run.resolution_of(step)
        for left in reversed(range(resolution.micro_batches)):
            student.set_gradient_accumulation_boundary(left == 0)
            batch = next(run.stream)
            drop_TB, path_BK, pairs_TB = loop.draw_noise(run, state, batch)
            target = run.targets_of(batch, resolution, pairs_TB)
            loss, _ = distill_loss(
                student(resolution.student_images(batch.images), path_BK),
                target,
                drop_TB,
                loss=cfg.loss,
                balance=state.balancer,
                distances=cfg.distances,
                ops=KERNELS[cfg.kernels],
            )
            student.backward(loss / resolution.micro_batches, scale_wrt_gas=False)
            student.step()
        state.teachers.track(optim.momentum(step, cfg.standardise, run.steps), taken)
        seconds.append(time.perf_counter() - begun)
    return seconds[1:-1]


def main(argv: list[str]) -> int:
    """Take turns, and print what came of it."""
    task = job.resolve(args.parse(argv)[1])
    found: dict[str, list[list[float]]] = {"ours": [], "bare": []}
    with loop.start_watchdog(task) as dog:
        run, state = setup.build(task, dog.set_phase)
        student, _ = setup.start_student(task, state.teachers)
        other = deepspeed_engine.build(student, task.cfg.optim, task.settings)
        votes = dist.StepVotes(*job.stop_files(task.out, ""))
        for turn in range(TURNS):
            first = 1 + turn * STEPS
            found["ours"].append(ours(run, state, first, votes))
            found["bare"].append(bare(run, state, other, first))
        run.stream.close()
    if dist.rank() == 0:
        print(json.dumps(summary(found)))
    return 0


def summary(found: dict[str, list[list[float]]]) -> dict[str, float]:
    """Milliseconds of a step in the median turn, and by how much ours is above the other.

    Of a turn all counted steps are summed: a median of steps would not see their log lines.
    """
    middle = {name: median(map(sum, turns)) for name, turns in found.items()}
    counted = STEPS - 2
    figures = {f"{name}_ms": round(1e3 * seconds / counted, 2) for name, seconds in middle.items()}
    share = round(middle["ours"] / middle["bare"] - 1, 5)
    return figures | {"steps": TURNS * counted, "overhead": share}


if __name__ == "__main__":
    sys.exit(entry_point.run(main, sys.argv[1:]))
