"""A stage of a run as two objects: `RunContext` is constant, steps change `TrainState`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unic_ds.config import Config
from unic_ds.config.job import Job
from unic_ds.data import Batch, Source, Stream
from unic_ds.engine.protocol import Engine
from unic_ds.losses.balancer import Balancer
from unic_ds.losses.dispersion import Dispersions
from unic_ds.models.resolution import Resolution
from unic_ds.models.step_resolutions import StepResolutions
from unic_ds.models.student import Student
from unic_ds.teachers.cache import FeatureCache
from unic_ds.teachers.teacher import TeacherFacts
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import Target
from unic_ds.training.checkpoint import RollbackRow
from unic_ds.training.first_images import FirstImages
from unic_ds.training.phases import Phases
from unic_ds.training.step_guard import StepGuard


@dataclass(kw_only=True)
class TrainState:
    """The contents of a checkpoint, with the teachers' statistics but not their frozen weights."""

    engine: Engine[Student]  # weights, moments, average
    teachers: TeacherSet
    balancer: Balancer
    dispersions: Dispersions  # of the teachers whose loss divides by it
    guard: StepGuard
    step: int = 0  # the optimiser step that is being taken, or that was taken last
    rollbacks: list[RollbackRow] = field(default_factory=list)  # so far


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Settings and data of a stage; none of them changes during training."""

    job: Job
    train: Source
    val: Source | None
    stream: Stream
    batches: Iterator[Batch]  # of `first_images`
    first_images: FirstImages  # of `stream`, with a copy of the first batch
    resolutions: StepResolutions  # of each step of the order
    # of (batch, its resolution, pairs of teacher and image to compute), by the frozen teachers,
    # standardised
    targets_of: Callable[[Batch, Resolution, NDArray[np.bool_] | None], dict[str, Target]]
    cache: FeatureCache | None  # features of teachers that are not run
    manifest: dict[str, TeacherFacts]  # the teachers' sources, hashes and preprocessing
    init: dict[str, dict[str, str]] | None  # hashes of the files that the student starts from
    flops_per_image: float
    phases: Phases
    sees_TM: NDArray[np.bool_] | None  # for each teacher and source of the images; None: all
    kinds_2M: NDArray[np.bool_] | None  # for each kind of token and source; None: all

    @property
    def cfg(self) -> Config:
        """The settings of the stage."""
        return self.job.cfg

    @property
    def out(self) -> Path:
        """The folder of the stage."""
        return self.job.out

    @cached_property
    def steps(self) -> int:
        """Optimiser steps from the first start to the end of training."""
        return self.cfg.optim.step_count(self.train.per_epoch)

    @property
    def last_step(self) -> int:
        """The last step of this start."""
        return min(self.cfg.run.stop_at or self.steps, self.steps)

    def resolution_of(self, step: int) -> Resolution:
        """Sides and micro batches of the images of optimiser step `step` (from 1)."""
        return self.resolutions.of_step(self.stream.data_step(step))

    def seen_pairs(self, batch: Batch) -> NDArray[np.bool_] | None:
        """True for the pairs (T, B) of teacher and image that are trained on; None: all."""
        if self.sees_TM is None:
            return None
        return self.sees_TM[:, self.train.part_of(batch.index_B)]

    def distilled_kinds(self, batch: Batch) -> NDArray[np.bool_] | None:
        """True for the kinds of token (cls, patch) that an image's loss has [2, B]; None: all."""
        if self.kinds_2M is None:
            return None
        return self.kinds_2M[:, self.train.part_of(batch.index_B)]
