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
from unic_ds.weights import warm_start


def export_and_evaluate(task: job.Job, parts: Any) -> None:
    """Write `student/`, then `results.json`, `results.png` and the table; every rank calls it.

    RuntimeError, on every rank, if the evaluation fails: `student/` is there then, and no
    `results.json`.
    """
    export_student(task, parts)
    dist.barrier()
    free_training_memory(parts)
    student, on = task.out / "student", task.cfg.eval.on
    rows: rounds.Rows = {}
    if on and can_evaluate(parts.train, parts.val):
        rows = evaluate(task, parts, student)
    if dist.rank() == 0:
        table.write(rows, task.out, run_log.read(task.out / "log.jsonl"))
        end = f"\n{table.render(rows)}" if rows else table.unevaluated(student, on=on)
        print(end, flush=True)


def evaluate(task: job.Job, parts: Any, student: Path) -> rounds.Rows:
    """The rows of `measure`; RuntimeError with the way on where it cannot read what it needs."""
    try:
        return measure(task, parts)
    except (OSError, RuntimeError, ValueError) as error:
        if not entry_point.is_expected(error):
            raise
        raise RuntimeError(
            f"the student is in {str(student)!r}, but it could not be evaluated; mend this and"
            f" start the same command again, which evaluates without training: {error}"
        ) from error


def export_student(task: job.Job, parts: Any) -> None:
    """Write `student/`: rank 0 does, of weights that all ranks give."""
    state, own = (deepspeed_engine.weights(parts.engine, part) for part in ("encoder.", "ladder."))
    if dist.rank() != 0:
        return
    path = student_folder.write(
        state,
        parts.engine.module.ladder,
        own,
        parts.teachers.state_dict(),
        cfg=task.cfg,
        source=parts.train,
        out=task.out / "student",
        teachers=parts.manifest,
    )
    console.say(f"exported encoder: {path}")


def free_training_memory(parts: Any) -> None:
    """Free what training held: every rank is about to hold the whole encoder, twice."""
    deepspeed_engine.free_memory(parts.engine)
    parts.engine = None
    gc.collect()  # DeepSpeed's objects know each other
    torch.cuda.empty_cache()  # DALI takes memory beside torch's; nothing where there is no GPU


def measure(task: job.Job, parts: Any) -> rounds.Rows:
    """kNN and linear accuracy (%) of pixels, each teacher, the student before and after."""
    from unic_ds.evaluate import knn, linear  # scikit-learn takes seconds, and few starts get here

    cfg, (train, val, widths) = task.cfg, extract(task, parts)
    evaluators = (
        partial(knn.knn, k=cfg.eval.k, temperature=cfg.eval.temperature),
        partial(linear.linear, seed=cfg.seed),
    )
    return rounds.evaluate(train, val, widths, evaluators, dist.device())


def extract(task: job.Job, parts: Any) -> tuple[rounds.Side, rounds.Side, dict[str, int]]:
    """Features of the training and the validation images, and how wide each model's are."""
    cfg, device = task.cfg, dist.device()
    before, after = (
        Student(cfg.student, cfg.ladder, {}, seed=cfg.seed).to(device).eval() for _ in range(2)
    )
    if task.init:
        warm_start.start_encoder(task.init, before.encoder)
    warm_start.start_encoder(str(task.out / "student"), after.encoder)
    widths: dict[str, int] = {}
    if parts.teachers.cached:
        console.say(f"not measured, since not run: {', '.join(parts.teachers.cached)}")

    def encode(images: dict[int, Tensor]) -> Tensor:
        small = images[cfg.student.size]
        columns = {"pixels": features.pixels(small)}
        columns |= {name: tokens.cls_BC for name, tokens in parts.teachers.features(images).items()}
        columns |= {
            "student before": before.encode(small).cls_BC,
            "student after": after.encode(small).cls_BC,
        }
        widths.update({name: value.shape[1] for name, value in columns.items()})
        return torch.cat([value.float() for value in columns.values()], 1)

    sizes = (cfg.student.size, *parts.teachers.sizes)
    train, val = (
        side_of(task, source, limit, sizes, encode)
        for source, limit in ((parts.train, cfg.eval.max_train), (parts.val, cfg.eval.max_val))
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
