"""After the last step: export the student, and compare it with its teachers, raw pixels and the
student before training.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from unic_ds import dist
from unic_ds.engine import deepspeed_engine
from unic_ds.evaluate import features, table
from unic_ds.evaluate.comparison import Comparison
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Model
from unic_ds.files import run_files
from unic_ds.harness import session
from unic_ds.harness.models import teacher_model
from unic_ds.harness.students import read_student, student_model
from unic_ds.models.encoder import grid_of
from unic_ds.models.model_folder import ModelFolder
from unic_ds.models.student import Student
from unic_ds.process import console, entry_point
from unic_ds.teachers.teacher import load
from unic_ds.training import pictures, run_log, student_folder
from unic_ds.training.attempts import Attempts
from unic_ds.training.run_log import RunLog
from unic_ds.training.run_report import RunReport
from unic_ds.training.state import RunContext, TrainState
from unic_ds.weights import card, warm_start


@dataclass(frozen=True)
class Evaluation:
    """The comparison, with the models of its pictures and the data of its sets."""

    found: Comparison
    models: list[Model] = field(default_factory=list)
    """The teachers and the student after training; none if nothing was compared."""
    data: dict[int, EvalData] = field(default_factory=dict)


def export_and_evaluate(
    run: RunContext, state: TrainState, *, open_log: Callable[[], RunLog]
) -> None:
    """Write `student/`, the results, also to its card, `pictures/` and the report; print them.

    Every rank calls it. `open_log` opens the run's log after the last step, which gets the
    pictures. RuntimeError, on every rank, if the evaluation fails: `student/` exists then,
    `results.json` does not. With `results.json` the run is finished: what follows may fail, which
    is a line, and is not made up for.
    """
    export_student(run, state)
    dist.barrier()
    free_training_memory(state)
    student, on = run.out / "student", run.cfg.eval.on
    evaluation = evaluate(run, state, student)
    found = evaluation.found
    if dist.rank() == 0:
        text = f"\n{table.render(found)}"
        console.say(text if found.rows else table.unevaluated(student, on=on))
    attempts = Attempts("a part of the finished run is missing")
    attempts.here(lambda: plot(run, found))
    if found.rows:
        attempts.here(lambda: card.rewrite(student, run.cfg, run.manifest, found))
    attempts.on_all_ranks(lambda: draw_pictures(run, state, evaluation, open_log=open_log))
    if dist.rank() == 0:
        RunReport(run.out).write(last=True)


def evaluate(run: RunContext, state: TrainState, student: Path) -> Evaluation:
    """The result of `measure`, written; RuntimeError with the remedy if that cannot be done."""
    try:
        evaluation = measure(run, state)
        dist.on_rank_0(lambda: write_results(run, evaluation.found))
    except (OSError, RuntimeError, ValueError) as error:
        if not entry_point.is_expected(error):
            raise
        raise RuntimeError(
            f"the student is in {str(student)!r}, but it could not be evaluated; mend this and"
            f" start the same command again, which evaluates without training: {error}"
        ) from error
    return evaluation


def write_results(run: RunContext, found: Comparison) -> None:
    """Write the results; print them if they cannot be written."""
    try:
        found.write(run.out)
    except OSError:
        console.say(f"\n{table.render(found)}")
        raise


def plot(run: RunContext, found: Comparison) -> None:
    """Draw the loss curve and the results to `results.png`."""
    log = run_log.read(run.out / run_files.LOG)
    table.plot(found, log, run.out / "results.png", title=run.out.name)


def draw_pictures(
    run: RunContext, state: TrainState, evaluation: Evaluation, *, open_log: Callable[[], RunLog]
) -> None:
    """Draw the pictures of the teachers and the student after; every rank calls it.

    Teachers of a feature cache are in them if they were evaluated.
    """
    if not run.cfg.probe.pictures:
        return
    opened: list[RunLog] = []
    attempts = Attempts("a picture is missing, which ends no run")
    if not attempts.on_all_ranks(lambda: opened.append(open_log())):
        return
    models = evaluation.models or [*live_teachers(state), student_after(run)]
    with opened[0] as log:
        drawn = pictures.Pictures(run, state, log)
        for data in evaluation.data.values():
            if drawn.bank is None:
                drawn.find_neighbours(data, models)
        drawn.draw(models)


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


def measure(run: RunContext, state: TrainState) -> Evaluation:
    """Compare pixels, each teacher, the student before and after by the tasks of the settings."""
    cfg = run.cfg
    sets = session.open_sets_of_run(cfg, run.train, run.val) if cfg.eval.on else {}
    if not sets:
        return Evaluation(Comparison({}, []))
    models = [*live_teachers(state), *cached_teachers(run, state), student_after(run)]
    data = session.data_of(sets, cfg, rows=cfg.teachers, store=None)
    found = session.compare_on(table_models(run, models), sets, data)
    return Evaluation(found, models, data)


def live_teachers(state: TrainState) -> list[Model]:
    """The teachers that training ran."""
    return list(map(teacher_model, state.teachers.teachers.values()))


def student_after(run: RunContext) -> Model:
    """The student after training, as it was exported."""
    return read_student("student after", ModelFolder(run.out / "student"), dist.device())


def table_models(run: RunContext, models: Sequence[Model]) -> list[Model]:
    """The models of the table, in its order: `models` and the baselines."""
    cfg = run.cfg
    before = Student(cfg.student, cfg.ladder, {}, seed=cfg.seed).to(dist.device()).eval()
    if run.job.init:
        warm_start.start_encoder(run.job.init, before.encoder)
    *teachers, after = models
    return [
        features.pixels_model(cfg.student.size),
        *teachers,
        student_model("student before", before, cfg.student, role="baseline"),
        after,
    ]


def cached_teachers(run: RunContext, state: TrainState) -> Iterator[Model]:
    """The teachers of a feature cache, as far as their weights are on this machine."""
    for row in run.cfg.teachers:
        if row.name not in state.teachers.cached:
            continue
        try:
            yield teacher_model(load(row, grid=grid_of(run.cfg.student), device=dist.device()))
        except ValueError as error:
            console.say(f"the cached teacher {row.name} is not evaluated: {error}")
