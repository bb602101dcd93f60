"""After the last step: export the student, and measure it beside its teachers, raw pixels and its
own start.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unic_ds import data, dist, rng
from unic_ds.config import job
from unic_ds.engine import deepspeed_engine
from unic_ds.evaluate import features, rounds, table
from unic_ds.models.student import Student
from unic_ds.process import console, entry_point
from unic_ds.training import run_log, student_folder
from unic_ds.training.setup import can_evaluate
from unic_ds.training.state import RunContext, TrainState
from unic_ds.weights import warm_start


def export_and_evaluate(run: RunContext, state: TrainState) -> None:
    """Write `student/`, then `results.json`, `results.png` and the table; every rank calls it.

    RuntimeError, on every rank, if the evaluation fails: `student/` is there then, and no
    `results.json`.
    """
    export_student(run, state)
    dist.barrier()
    free_training_memory(state)
    student, on = run.out / "student", run.cfg.eval.on
    rows: rounds.Rows = {}
    if on and can_evaluate(run.train, run.val):
        rows = evaluate(run, state, student)
    if dist.rank() == 0:
        table.write(rows, run.out, run_log.read(run.out / "log.jsonl"))
        end = f"\n{table.render(rows)}" if rows else table.unevaluated(student, on=on)
        print(end, flush=True)


def evaluate(run: RunContext, state: TrainState, student: Path) -> rounds.Rows:
    """The rows of `measure`; RuntimeError with the way on where it cannot read what it needs."""
    try:
        return measure(run, state)
    except (OSError, RuntimeError, ValueError) as error:
        if not entry_point.is_expected(error):
            raise
        raise RuntimeError(
            f"the student is in {str(student)!r}, but it could not be evaluated; mend this and"
            f" start the same command again, which evaluates without training: {error}"
        ) from error


def export_student(run: RunContext, state: TrainState) -> None:
    """Write `student/`: rank 0 does, of weights that all ranks give."""
    weights, own = (
        deepspeed_engine.weights(state.engine, part) for part in ("encoder.", "ladder.")
    )
    if dist.rank() != 0:
        return
    path = student_folder.write(
        weights,
        state.engine.module.ladder,
        own,
        state.teachers.state_dict(),
        cfg=run.cfg,
        source=run.train,
        out=run.out / "student",
        teachers=run.manifest,
    )
    console.say(f"exported encoder: {path}")


def free_training_memory(state: TrainState) -> None:
    """Free what training held: every rank is about to hold the whole encoder, twice."""
    deepspeed_engine.free_memory(state.engine)
    del state.engine
    gc.collect()  # DeepSpeed's objects know each other
    torch.cuda.empty_cache()  # DALI takes memory beside torch's; nothing where there is no GPU


def measure(run: RunContext, state: TrainState) -> rounds.Rows:
    """kNN and linear accuracy (%) of pixels, each teacher, the student before and after."""
    from unic_ds.evaluate import knn, linear  # scikit-learn takes seconds, and few starts get here

    cfg, (train, val, widths) = run.cfg, extract(run, state)
    evaluators = (
        partial(knn.knn, k=cfg.eval.k, temperature=cfg.eval.temperature),
        partial(linear.linear, seed=cfg.seed),
    )
    return rounds.evaluate(train, val, widths, evaluators, dist.device())


def extract(run: RunContext, state: TrainState) -> tuple[rounds.Side, rounds.Side, dict[str, int]]:
    """Features of the training and the validation images, and how wide each model's are."""
    task, cfg, device = run.job, run.cfg, dist.device()
    assert run.val is not None
    before, after = (
        Student(cfg.student, cfg.ladder, {}, seed=cfg.seed).to(device).eval() for _ in range(2)
    )
    if task.init:
        warm_start.start_encoder(task.init, before.encoder)
    warm_start.start_encoder(str(task.out / "student"), after.encoder)
    widths: dict[str, int] = {}
    if state.teachers.cached:
        console.say(f"not measured, since not run: {', '.join(state.teachers.cached)}")

    def encode(images: dict[int, Tensor]) -> Tensor:
        small = images[cfg.student.size]
        columns = {"pixels": features.pixels(small)}
        columns |= {name: tokens.cls_BC for name, tokens in state.teachers.features(images).items()}
        columns |= {
            "student before": before.encode(small).cls_BC,
            "student after": after.encode(small).cls_BC,
        }
        widths.update({name: value.shape[1] for name, value in columns.items()})
        return torch.cat([value.float() for value in columns.values()], 1)

    sizes = (cfg.student.size, *state.teachers.sizes)
    train, val = (
        side_of(task, source, limit, sizes, encode)
        for source, limit in ((run.train, cfg.eval.max_train), (run.val, cfg.eval.max_val))
    )
    return train, val, widths


def side_of(
    task: job.Job,
    source: Any,
    limit: int,
    sizes: tuple[int, ...],
    encode: Callable[[dict[int, Tensor]], Tensor],
) -> rounds.Side:
    """Features and labels of a seeded choice of `limit` images, shared by ranks."""
    words_N = rng.random_bits(task.cfg.seed, "probe", 1, np.arange(len(source)))[:, 0]
    order_N = np.argsort(words_N, kind="stable")
    chosen_N = np.sort(order_N[source.label_N[order_N] >= 0][:limit])
    mine_R = chosen_N[rounds.dealt(len(chosen_N))]
    batches = data.passes(
        source,
        task.cfg.data,
        sizes=tuple(dict.fromkeys(sizes)),
        batch=task.cfg.eval.batch,
        indices=mine_R,
        device=dist.device(),
    )
    labels: list[Any] = []

    def noted() -> Iterator[Any]:
        for batch in console.track(batches, -(-len(mine_R) // task.cfg.eval.batch), "evaluating"):
            # of what is shown: for a broken image that is its neighbour
            labels.append(source.label_N[batch.index_B])
            yield batch

    share_RC = features.extract(encode, noted())
    label_WR = dist.all_gather(torch.from_numpy(np.concatenate(labels)))
    return rounds.Side(share_RC, rounds.in_order(label_WR, len(chosen_N)))
