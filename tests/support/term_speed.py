"""Cost of loss terms in plain torch beside a training step: `term_speed.py OPTIONS`.

One process trains a ViT-B from two ViT-B teachers of random weights, in turns of steps with each
loss of `LOSSES` on the same student. The difference is far smaller than the noise of a step, so the
loss and its gradients are also timed alone, on the predictions and targets of one micro batch.
Prints one JSON object. The options are those of unic_ds/train.py; `--data.train` is needed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from statistics import median

import torch
from lazy_speed import SETTINGS
from torch.utils.flop_counter import FlopCounterMode

from unic_ds.config import args, job
from unic_ds.process import entry_point
from unic_ds.tokens import Target, Tokens
from unic_ds.training import loop, setup
from unic_ds.training.state import RunContext, TrainState

PLAIN = "0.5 cosine + 0.5 smooth_l1"
LOSSES = {
    "plain": PLAIN,
    "dispersion": f"{PLAIN} + dispersion",
    "relational": f"{PLAIN} + relational",
}
"""The CLS tokens' losses."""
TURNS, ROUNDS = 2, 30
OPTIONS = SETTINGS | {
    "--teachers": "t0=python:lazy_speed:vit_base,t1=python:lazy_speed:vit_base",
    "--drop.lazy": "false",
    "--loss.cls": LOSSES["dispersion"],  # with which the run keeps the teachers' dispersions
}


def with_loss(run: RunContext, cls: str) -> RunContext:
    """The run with another loss of CLS tokens."""
    loss = replace(run.cfg.loss, cls=cls)
    return replace(run, job=replace(run.job, cfg=replace(run.cfg, loss=loss)))


def micro_batch(
    run: RunContext, state: TrainState
) -> tuple[dict[str, Tokens], Mapping[str, Target], torch.Tensor]:
    """Predictions as leaves of the graph, targets and the uniforms of dropping."""
    batch = next(run.batches)
    drop_TB, path_BK, pairs_TB = loop.draw_noise(run, state, batch)
    resolution = run.resolution_of(state.step)
    target = run.targets_of(batch, resolution, pairs_TB)
    with torch.no_grad():
        pred = state.engine(resolution.student_images(batch.images), path_BK)
    leaves = {
        name: Tokens(*(x.detach().clone().requires_grad_() for x in tokens))
        for name, tokens in pred.items()
    }
    return leaves, target, drop_TB


def seconds(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main(argv: list[str]) -> int:
    """Take turns, and print what came of it."""
    task = job.resolve(args.parse([*chain.from_iterable(OPTIONS.items()), *argv])[1])
    steps: dict[str, list[float]] = {name: [] for name in LOSSES}
    alone: dict[str, list[float]] = {name: [] for name in LOSSES}
    with loop.start_watchdog(task) as dog:
        run, state = setup.build(task, dog.set_phase)
        runs = {name: with_loss(run, cls) for name, cls in LOSSES.items()}

        def step(name: str) -> None:
            state.step += 1
            loop.train_step(runs[name], state)

        flops = count_flops(lambda: step("plain"))  # warm-up: not timed
        for _ in range(TURNS):
            for name in LOSSES:
                steps[name].append(seconds(lambda name=name: step(name)))
        pred, target, drop_TB = micro_batch(run, state)
        leaves = list(chain.from_iterable(pred.values()))

        def loss(name: str) -> None:
            found, _ = loop.compute_loss(
                runs[name], state, pred, target, drop_TB, run.resolution_of(state.step)
            )
            torch.autograd.grad(found, leaves)

        terms = {name: count_flops(lambda name=name: loss(name)) for name in LOSSES}
        for _ in range(ROUNDS):
            for name in LOSSES:
                alone[name].append(seconds(lambda name=name: loss(name)))
        run.stream.close()
    print(json.dumps(summary(steps, alone) | {"step_flops": flops, "loss_flops": terms}))
    return 0


def summary(
    steps: Mapping[str, list[float]], alone: Mapping[str, list[float]]
) -> dict[str, dict[str, float]]:
    """Medians, and what each term adds to a step without it: by steps, and by the loss alone."""
    step_s = {name: median(found) for name, found in steps.items()}
    loss_s = {name: median(found) for name, found in alone.items()}
    others = [name for name in LOSSES if name != "plain"]
    return {
        "step_s": {name: round(value, 3) for name, value in step_s.items()},
        "loss_ms": {name: round(1e3 * value, 2) for name, value in loss_s.items()},
        "added_by_steps": {name: round(step_s[name] / step_s["plain"] - 1, 4) for name in others},
        "added_by_loss": {
            name: round((loss_s[name] - loss_s["plain"]) / step_s["plain"], 6) for name in others
        },
    }


if __name__ == "__main__":
    sys.exit(entry_point.run(main, sys.argv[1:]))
