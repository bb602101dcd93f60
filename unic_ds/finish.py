"""After the last step: export the student, and measure it beside its teachers, raw pixels and its
own start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unic_ds import chance, config, data, dist, engine, entry, export, initial, job, log
from unic_ds.evaluate import features, table
from unic_ds.parts import can_evaluate
from unic_ds.student import Student


def finish(task: job.Job, parts: Any) -> None:
    """Write `student/`, then `results.json`, `results.png` and the table; every rank calls it.

    Rank 0 fits the probes alone: the others are done, and wait for nothing. RuntimeError if the
    evaluation fails: `student/` is there then, and no `results.json`.
    """
    publish(task, parts)
    dist.barrier()
    let_go(parts)
    student, on = task.out / "student", task.cfg.eval.on
    rows = {}
    if on and can_evaluate(parts.train, parts.val):
        rows = evaluate(task, parts, student)
    if dist.rank() == 0:
        table.write(rows, task.out, log.read(task.out / "log.jsonl"))
        end = f"\n{table.render(rows)}" if rows else table.unevaluated(student, on=on)
        print(end, flush=True)


def evaluate(task: job.Job, parts: Any, student: Path) -> dict[str, dict[str, float]]:
    """The rows of `measure`; RuntimeError with the way on where it cannot read what it needs."""
    try:
        return measure(task, parts)
    except (OSError, RuntimeError, ValueError) as error:
        if not entry.ours(error):
            raise
        raise RuntimeError(
            f"the student is in {str(student)!r}, but it could not be evaluated; mend this and"
            f" start the same command again, which evaluates without training: {error}"
        ) from error


def publish(task: job.Job, parts: Any) -> None:
    """Write `student/`: rank 0 does, of weights that all ranks give."""
    state, own = (engine.weights(parts.engine, part) for part in ("encoder.", "ladder."))
    if dist.rank() != 0:
        return
    beside = {
        export.LADDER: parts.engine.module.ladder.published(own),
        export.STATISTICS: parts.teachers.state_dict(),
    }
    images, out = sample(parts.train, task.cfg, 8), task.out / "student"
    path = export.export(state, task.cfg, images, out, teachers=parts.manifest, beside=beside)
    log.say(f"exported encoder: {path}")


def let_go(parts: Any) -> None:
    """Free what training held: every rank is about to hold the whole encoder, twice."""
    engine.release(parts.engine)
    parts.engine = None
    gc.collect()  # DeepSpeed's objects know each other
    torch.cuda.empty_cache()  # DALI takes memory beside torch's; nothing where there is no GPU


def sample(source: Any, cfg: config.Config, count: int) -> Tensor:
    """A few real images at the student's size, uint8 B3HW."""
    indices = np.arange(min(count, len(source)))
    size = cfg.student.size
    batches = data.passes(
        source, cfg.data, sizes=(size,), batch=count, indices=indices, device=torch.device("cpu")
    )
    return next(iter(batches)).images[size]


def measure(task: job.Job, parts: Any) -> dict[str, dict[str, float]]:
    """kNN and linear accuracy (%) of pixels, each teacher, the student before and after."""
    from unic_ds.evaluate import knn, linear  # scikit-learn takes seconds, and few starts get here

    cfg, device = task.cfg, dist.device()
    before, after = (
        Student(cfg.student, cfg.ladder, {}, seed=cfg.seed).to(device).eval() for _ in range(2)
    )
    if task.init:
        initial.start_encoder(task.init, before.encoder)
    initial.start_encoder(str(task.out / "student"), after.encoder)
    widths: dict[str, int] = {}
    if parts.teachers.stored:
        log.say(f"not measured, since not run: {', '.join(parts.teachers.stored)}")

    def encode(images: dict[int, Tensor]) -> Tensor:
        small = images[cfg.student.size]
        columns = {"pixels": features.pixels(small)}
        columns |= {name: tokens.cls_BC for name, tokens in parts.teachers.raw(images).items()}
        columns |= {
            "student before": before.encode(small).cls_BC,
            "student after": after.encode(small).cls_BC,
        }
        widths.update({name: value.shape[1] for name, value in columns.items()})
        return torch.cat([value.float() for value in columns.values()], 1)

    sides = [
        gather_features(task, source, limit, (cfg.student.size, *parts.teachers.sizes), encode)
        for source, limit in ((parts.train, cfg.eval.max_train), (parts.val, cfg.eval.max_val))
    ]
    if dist.rank() != 0:
        return {}
    (train_NC, train_N), (val_NC, val_N) = sides
    rows: dict[str, dict[str, float]] = {}
    for name, train, val in zip(
        widths, columns_of(train_NC, widths), columns_of(val_NC, widths), strict=True
    ):
        scores = [
            *knn.knn(train, train_N, val, val_N, k=cfg.eval.k, temperature=cfg.eval.temperature),
            *linear.linear(train, train_N, val, val_N, seed=cfg.seed),
        ]
        rows[name] = dict(scores)
    return rows


def columns_of(values_NC: Tensor, widths: dict[str, int]) -> Iterator[Tensor]:
    """Each model's columns of features that stand side by side."""
    return iter(values_NC.split(list(widths.values()), 1))


def gather_features(
    task: job.Job, source: Any, limit: int, sizes: tuple[int, ...], encode: Any
) -> Any:
    """Features (N, C) and labels (N) of a seeded choice of `limit` images, shared by ranks."""
    words_N = chance.words(task.cfg.seed, "probe", 1, np.arange(len(source)))[:, 0]
    order_N = np.argsort(words_N, kind="stable")
    chosen_N = np.sort(order_N[source.label_N[order_N] >= 0][:limit])
    mine_N = chosen_N[dist.rank() :: dist.world()]
    share, longest = len(mine_N), -(-len(chosen_N) // dist.world())
    batches = data.passes(
        source,
        task.cfg.data,
        sizes=tuple(dict.fromkeys(sizes)),
        batch=task.cfg.eval.batch,
        # equally many for all: teachers may be spread over the ranks
        indices=np.append(mine_N, chosen_N[: longest - share]),
        device=dist.device(),
    )
    labels: list[Any] = []

    def noted() -> Iterator[Any]:
        for batch in log.track(batches, -(-share // task.cfg.eval.batch), "evaluating"):
            # of what is shown: for a broken image that is its neighbour
            labels.append(source.label_N[batch.index_B])
            yield batch

    values_NC = dist.gather_rows(features.extract(encode, noted())[:share])
    labels_N = dist.gather_rows(torch.from_numpy(np.concatenate(labels))[:share])
    return values_NC[labels_N >= 0], labels_N[labels_N >= 0]
