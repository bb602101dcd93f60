"""After the last step: export the student, and compare it with its teachers, raw pixels and the
student before training.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unic_ds import config, data, dist, rng
from unic_ds.data import Source
from unic_ds.engine import deepspeed_engine
from unic_ds.evaluate import features, registry, table
from unic_ds.evaluate.features import Annotation, EvalBatch, Model, ModelOutput, Outputs
from unic_ds.evaluate.table import Score
from unic_ds.models.student import Student
from unic_ds.process import console, entry_point
from unic_ds.tokens import Tokens
from unic_ds.training import run_log, student_folder
from unic_ds.training.setup import can_evaluate
from unic_ds.training.state import RunContext, TrainState
from unic_ds.weights import warm_start


def export_and_evaluate(run: RunContext, state: TrainState) -> None:
    """Write `student/`, then `results.json`, `results.png` and the table; every rank calls it.

    RuntimeError, on every rank, if the evaluation fails: `student/` exists then, `results.json`
    does not.
    """
    export_student(run, state)
    dist.barrier()
    free_training_memory(state)
    student, on = run.out / "student", run.cfg.eval.on
    scores: list[Score] = []
    if on and can_evaluate(run.train, run.val):
        scores = evaluate(run, state, student)
    if dist.rank() == 0:
        rows, protocols = table.tabulate(scores)
        table.write(rows, run.out, run_log.read(run.out / "log.jsonl"), protocols)
        text = f"\n{table.render(rows, protocols)}"
        end = text if rows else table.unevaluated(student, on=on)
        console.say(end)


def evaluate(run: RunContext, state: TrainState, student: Path) -> list[Score]:
    """The scores of `measure`; RuntimeError with the remedy if it cannot read what it needs."""
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
    """Write `student/` on rank 0; every rank calls it, since the weights are gathered."""
    encoder_state, ladder_state = (
        deepspeed_engine.weights(state.engine, part) for part in ("encoder.", "ladder.")
    )
    if dist.rank() != 0:
        return
    path = student_folder.write(
        encoder_state,
        state.engine.module.ladder,
        ladder_state,
        state.teachers.state_dict(),
        cfg=run.cfg,
        source=run.train,
        out=run.out / "student",
        teachers=run.manifest,
    )
    console.say(f"exported encoder: {path}")


def free_training_memory(state: TrainState) -> None:
    """Free the memory of training: the evaluation holds two full encoders on every rank."""
    deepspeed_engine.free_memory(state.engine)
    del state.engine
    gc.collect()  # DeepSpeed's objects are in reference cycles
    torch.cuda.empty_cache()  # for DALI, which allocates outside torch; a no-op without a GPU


def measure(run: RunContext, state: TrainState) -> list[Score]:
    """Scores of pixels, each teacher that is run, the student before and after."""
    cfg = run.cfg
    assert run.val is not None
    if state.teachers.cached:
        console.say(f"cached teachers are not evaluated: {', '.join(state.teachers.cached)}")
    train, val = (
        SampledImages(source, cfg, limit)
        for source, limit in ((run.train, cfg.eval.max_train), (run.val, cfg.eval.max_val))
    )
    return registry.evaluate_models(
        models_of(run, state),
        train,
        val,
        options=cfg.eval,
        seed=cfg.seed,
        device=dist.device(),
    )


def models_of(run: RunContext, state: TrainState) -> list[Model]:
    """The models of the table, in its order."""
    cfg, size = run.cfg, run.cfg.student.size
    before, after = (
        Student(cfg.student, cfg.ladder, {}, seed=cfg.seed).to(dist.device()).eval()
        for _ in range(2)
    )
    if run.job.init:
        warm_start.start_encoder(run.job.init, before.encoder)
    warm_start.start_encoder(str(run.out / "student"), after.encoder)
    return [
        Model("pixels", size, frozenset({"cls"}), lambda image, _: Outputs(features.pixels(image))),
        *(encoder(name, t.size, t) for name, t in state.teachers.teachers.items()),
        encoder("student before", size, before.encode),
        encoder("student after", size, after.encode),
    ]


def encoder(name: str, size: int, encode: Callable[[Tensor], Tokens]) -> Model:
    """A model with CLS and patch tokens, such as a teacher or a `Student`'s `encode`."""

    @torch.no_grad()
    def outputs(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        return Outputs(*encode(image_B3HW))

    return Model(name, size, frozenset({"cls", "patch"}), outputs)


class SampledImages:
    """A seeded sample of a source's labelled images, divided among the ranks (`features.ImageSet`).

    An image that cannot be read is left out; ValueError for too many of them.
    """

    annotations: frozenset[Annotation] = frozenset({"labels"})

    def __init__(self, source: Source, cfg: config.Config, limit: int):
        """Choose at most `limit` images."""
        bits_N = rng.random_bits(cfg.seed, "probe", 1, np.arange(len(source)))[:, 0]
        order_N = np.argsort(bits_N, kind="stable")
        self.source, self.cfg = source, cfg
        self.chosen_N = np.sort(order_N[source.label_N[order_N] >= 0][:limit])

    def __len__(self) -> int:
        return len(self.chosen_N)

    def batches(self, sizes: Sequence[int]) -> Iterator[EvalBatch]:
        """This rank's images once, as central squares."""
        place_R, counted_R = features.deal(len(self))
        size = self.cfg.eval.batch
        shown = data.passes(
            self.source,
            self.cfg.data,
            sizes=tuple(dict.fromkeys(sizes)),
            batch=size,
            indices=self.chosen_N[place_R],
            device=dist.device(),
        )
        total = -(-len(place_R) // size)
        for at, batch in enumerate(console.track(shown, total, "encoding images")):
            here = slice(at * size, (at + 1) * size)
            place_B = place_R[here]
            # A broken image is replaced by its neighbour, which must not count twice.
            read_B = batch.index_B == self.chosen_N[place_B]
            place_B = np.where(counted_R[here] & read_B, place_B, features.FILLER)
            labels = self.source.label_N[batch.index_B]
            yield EvalBatch(batch.images, place_B, {"labels": labels})
