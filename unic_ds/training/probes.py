"""Probes: the student is measured during training, on a fixed sample of labelled images.

A probe copies the student's fp32 weights, or their average (`optim.ema`), to a student of its own,
and measures that: it is what a run that ended here would export, under every ZeRO stage, and
nothing of training changes. Teachers are measured once per start. Each probe draws pictures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from unic_ds import blocks, config, dist
from unic_ds.config.evaluation import PROBES, TASKS
from unic_ds.data import Source
from unic_ds.engine import deepspeed_engine
from unic_ds.evaluate import registry, table
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Model
from unic_ds.evaluate.knn import row_names
from unic_ds.harness import layouts
from unic_ds.harness.image_sets import SampledImages, can_evaluate
from unic_ds.harness.layouts import Sets
from unic_ds.harness.models import teacher_model
from unic_ds.harness.students import student_model
from unic_ds.models.ladder import heads_of
from unic_ds.models.student import Student
from unic_ds.process import console
from unic_ds.training.checkpoint import ProbedValue
from unic_ds.training.pictures import Pictures
from unic_ds.training.run_log import RunLog
from unic_ds.training.state import RunContext, TrainState
from unic_kernels.ops import KERNELS

STUDENT = "student"
AGREEMENT = "teacher"
"""The task that compares the student with the teachers, whose features it needs each time."""


def check(cfg: config.Config, train: Source, val: Source | None) -> None:
    """ValueError if the probes of a run have an unknown task, no images for one or no best_by."""
    if not cfg.probe.every:
        return
    known = [name for name in registry.EVALUATORS if name in PROBES or name not in TASKS]
    for task in cfg.probe.tasks:
        if task not in known:
            raise ValueError(f"probe.tasks must be of {', '.join(known)}, got {task!r}")
    check_best_by(cfg)
    if cfg.probe.data:
        open_sets(cfg, train, val)
    elif val is None:
        raise ValueError(
            "--probe.every needs validation images: give --data.val DIR, --data.val_share or"
            " --probe.data DIR"
        )
    elif not can_evaluate(train, val):
        for task in filter(needs_labels, cfg.probe.tasks):
            raise ValueError(
                f"the probe {task} needs labels: {table.NEEDS}, or --probe.data DIR; else choose"
                " other --probe.tasks"
            )


def check_best_by(cfg: config.Config) -> None:
    """ValueError if run.best_by is a value of kNN that its numbers of neighbours do not give."""
    by, known = cfg.run.best_by, [f"probe/{name}" for name in row_names(cfg.eval.neighbours)]
    if cfg.run.keep_best and by.split(" ")[0] == "probe/knn" and by not in known:
        raise ValueError(
            f"run.best_by must be one of {', '.join(known)}, by eval.k or its protocol; got {by!r}"
        )


def needs_labels(task: str) -> bool:
    """True if a task is measured by the classes of the images."""
    return "labels" in registry.EVALUATORS[task].data_needs


def open_sets(cfg: config.Config, train: Source, val: Source | None) -> Sets:
    """The sample of --probe.data, or else of a run's own images; the same at every start."""
    count = cfg.probe.images
    if cfg.probe.data:
        limited = replace(cfg, eval=replace(cfg.eval, max_train=count, max_val=count))
        return layouts.open_sets("knn", Path(cfg.probe.data), limited)
    assert val is not None
    labelled = any(map(needs_labels, cfg.probe.tasks))
    return {
        name: SampledImages(source, cfg, count, labelled=labelled, name=name)
        for name, source in (("train", train), ("val", val))
    }


@dataclass
class Probes:
    """Probes of one start; every rank has them, and calls them together."""

    run: RunContext
    state: TrainState
    log: RunLog
    drawn: Pictures
    student: Student | None = None
    """A student in fp32 that gets the weights at each probe; on the CPU between them."""
    of_teachers: list[Score] | None = None
    latest: tuple[int, list[Score]] = field(default=(0, []))
    """Step of the latest probe, and the student's scores."""
    lack_noted: bool = False

    def measure(self) -> None:
        """Measure the student after the current step; the next log line has the values.

        RuntimeError, on every rank, if an evaluation fails.
        """
        run, step, start = self.run, self.state.step, time.monotonic()
        run.phases.set_phase("probing", step)
        with self.log.bar_hidden(), blocks.uncompiled(run.cfg.run.compile != "none"):
            scores = self.evaluate()
        self.latest = step, [score for score in scores if score.model == STUDENT]
        values = {name_of(score): score.value for score in [*scores, *(self.of_teachers or ())]}
        self.note_lack(run.cfg.run)
        shown = firsts(self.latest[1], run.cfg.probe.tasks)
        self.log.add_probe(values, shown=shown, seconds=time.monotonic() - start)

    def note_lack(self, cfg: config.Run) -> None:
        """Print a line, once, if the latest probe lacks the value of run.best_by."""
        known = [name_of(score) for score in self.latest[1] if score.better]
        if self.lack_noted or not cfg.keep_best or cfg.best_by in ("loss", *known):
            return
        self.lack_noted = True
        console.say(
            f"run.best_by {cfg.best_by!r} is not measured, so no checkpoint is kept as one of the"
            f" best; the probes measure {', '.join(known)}"
        )

    def facts(self, step: int) -> dict[str, ProbedValue]:
        """Values of the student after `step`, for a checkpoint; empty without a probe there."""
        probed, scores = self.latest
        if step != probed:
            return {}
        return {name_of(s): ProbedValue(value=s.value, better=s.better) for s in scores}

    def evaluate(self) -> list[Score]:
        """Scores of the student as it is now; those of the teachers are kept, once known."""
        tasks = self.run.cfg.probe.tasks
        alone = [task for task in tasks if task != AGREEMENT]
        with torch.no_grad():
            student = self.current_student()
            if self.of_teachers is None:
                data = self.data()
                self.of_teachers = registry.evaluate_models(self.teachers, data, alone)
                self.drawn.find_neighbours(data, self.teachers)
            data = self.data()
            scores = registry.evaluate_models([student], data, alone)
            if AGREEMENT in tasks:
                both = [*self.teachers, student]
                scores += registry.evaluate_models(both, data, [AGREEMENT])
            self.drawn.find_neighbours(data, [student])
            self.drawn.draw([*self.teachers, student])
        assert self.student is not None
        self.student.cpu()
        return scores

    def data(self) -> EvalData:
        """The images, without features of an earlier probe."""
        cfg = self.run.cfg
        return EvalData(self.sets, options=cfg.eval, seed=cfg.seed, device=dist.device())

    @cached_property
    def sets(self) -> Sets:
        """The sample of images."""
        return open_sets(self.run.cfg, self.run.train, self.run.val)

    @cached_property
    def teachers(self) -> list[Model]:
        """The teachers that are run."""
        teachers = self.state.teachers
        if teachers.cached:
            console.say(f"cached teachers are not probed: {', '.join(teachers.cached)}")
        return [teacher_model(teacher) for teacher in teachers.teachers.values()]

    def current_student(self) -> Model:
        """The student with the weights and statistics of the current step."""
        state, cfg = self.state, self.run.cfg
        if self.student is None:
            self.student = empty_student(cfg, state.teachers.widths)
        self.student.to(dist.device())
        deepspeed_engine.copy_weights(state.engine, self.student)
        return student_model(STUDENT, self.student, cfg.student, statistics=state.teachers.norms)


def empty_student(cfg: config.Config, widths: Mapping[str, int]) -> Student:
    """A student in fp32, uncompiled, whose weights are to be copied; random states stay."""
    with torch.random.fork_rng(devices=[]):  # timm draws initial weights
        student = Student(
            cfg.student,
            cfg.ladder,
            heads_of(cfg, widths),
            seed=cfg.seed,
            ops=KERNELS[cfg.kernels],
        )
    return student.eval().requires_grad_(False)


def name_of(score: Score) -> str:
    """Name of a value in the log: `probe/knn`, of a teacher `probe/knn/dinov2`."""
    name = f"probe/{score.name}"
    return name if score.model == STUDENT else f"{name}/{score.model}"


def firsts(scores: Sequence[Score], tasks: Sequence[str]) -> str:
    """The first value of each task, for the progress line."""
    found = []
    for task in tasks:
        named = (score for score in scores if score.name.split(" ")[0] == task)
        if score := next(named, None):
            found.append(f"{score.name} {score.value:.3g}{score.unit}")
    return "  ".join(found)
