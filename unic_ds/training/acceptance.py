"""Refuse a run that would fail in its first minute; `check`, `plan` and `train` call it.

Models are built and run on the meta device, without weights; nothing is downloaded or written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from unic_ds import config, data, dist
from unic_ds.config import data_spec, job, plugins
from unic_ds.config.evaluation import TASKS
from unic_ds.data import shards
from unic_ds.evaluate.registry import EVALUATORS
from unic_ds.files.tensor_files import misfit
from unic_ds.harness import image_sets
from unic_ds.losses import balance
from unic_ds.losses.balance import BALANCERS
from unic_ds.losses.terms import TERMS
from unic_ds.models.encoder import build_encoder, grid_of, grids_of
from unic_ds.models.meta import NoInit
from unic_ds.models.step_resolutions import StepResolutions
from unic_ds.planning import trace
from unic_ds.process import console
from unic_ds.teachers import quantisation, sources, teacher_set
from unic_ds.teachers.sources import SOURCES
from unic_ds.teachers.teacher import Teacher
from unic_ds.training import probes, setup, trackers
from unic_ds.weights import warm_start

REGISTERED = plugins.Names(
    sources=SOURCES, terms=TERMS, balancers=BALANCERS, tasks=EVALUATORS.keys() | TASKS
)
"""Names in the registries, including those of plugins."""

UNKNOWN = 8
"""Channels that are assumed for a teacher that is cached or not called."""


def accept(stages: Sequence[job.Job], *, starting: bool = False) -> None:
    """ValueError if one of a run's unfinished stages would be refused.

    `starting`: the first of them is about to be built, which checks its teachers' towers, its
    images and its initial weights within the same minute; they are not checked twice.
    """
    for number, stage in enumerate(stages, 1):
        with naming_stage(number, len(stages)):
            data.backend(stage.cfg.data)
            trackers.check(stage.cfg.run.track)
    accept_models([stage.cfg for stage in stages], located=True, starting=starting)
    for number, stage in enumerate(stages, 1):
        with naming_stage(number, len(stages)):
            StepResolutions(stage.cfg, stage.settings)
    for number, stage in enumerate([] if starting else stages, 1):
        with naming_stage(number, len(stages)):
            accept_files(stage)


def accept_models(
    stages: Sequence[config.Config], *, located: bool = False, starting: bool = False
) -> None:
    """ValueError for a student, ladder or teacher of a stage that cannot be built.

    `located`: teachers' weights must be on this machine, which must be able to run them.
    """
    for number, cfg in enumerate(stages, 1):
        with naming_stage(number, len(stages)):
            plugins.check_names(cfg, REGISTERED)
            outlined, called = number > 1 or not starting, located and not starting
            widths = accept_teachers(cfg, outlined=outlined, located=located, called=called)
            accept_student(cfg, widths)
            if number > 1:
                accept_successor(stages[number - 2], cfg)


@contextmanager
def naming_stage(number: int, count: int) -> Iterator[None]:
    """Context manager that adds the number of the stage to a ValueError, if there are several."""
    try:
        yield
    except ValueError as error:
        if count == 1:
            raise
        raise ValueError(f"stage {number} of {count}: {error}") from None


def accept_teachers(
    cfg: config.Config, *, outlined: bool, located: bool, called: bool
) -> dict[str, int]:
    """Channels of each teacher, `UNKNOWN` if it is not built; ValueError if one cannot be built.

    `outlined`: teachers of timm and open_clip are built; `called`: those of python: sources, too.
    `located`: their weights must be on this machine, which must be able to run them.
    """
    grid, widths = grid_of(cfg.student), {row.name: UNKNOWN for row in cfg.teachers}
    grids = set(grids_of(cfg)) - {grid}
    stored = trace.stored(cfg)
    for row in cfg.teachers:
        if row.name in stored:
            continue
        if located:
            sources.locate(row)
            quantisation.check_device(row, dist.device())
        if outlined and (called or sources.has_outline(row)):
            plain = replace(row, placement="replicate", micro=0)
            widths[row.name] = width_of(plain, grid)
            for other in () if row.own_side else sorted(grids):
                width_of(plain, other)
        if called:
            sources.check_weights(row, grid)
    return widths


@cache
def width_of(row: config.Teacher, grid: int) -> int:
    """Channels of a teacher; ValueError if it cannot be built or fails on an image.

    A python: source is called, and runs on this rank's device.
    """
    unquantised = replace(row, precision="bf16") if row.quantised else row
    if sources.has_outline(row):
        teacher = trace.outlined(unquantised, grid)
    else:
        with NoInit():
            source = sources.outline(unquantised, grid=grid)
        teacher = Teacher(unquantised, source, grid=grid, device=dist.device())
    if row.quantised:
        quantisation.check_tower(row, teacher.tower.blocks())
    return teacher.width


def accept_student(cfg: config.Config, widths: dict[str, int]) -> None:
    """ValueError if a student, ladder or standardisation cannot be built."""
    if cfg.run.deterministic and cfg.data.sizes and dist.device().type == "cuda":
        raise ValueError(
            f"run.deterministic must be false with data.sizes {cfg.data.sizes} on a GPU: torch has"
            " no deterministic backward of resized position embeddings there"
        )
    trace.outline(cfg, widths)
    balance.build(cfg)
    kind = teacher_set.KINDS[cfg.standardise.kind if cfg.standardise.on else "channel"]
    for name, width in widths.items():
        with teacher_set.blaming(name), torch.device("meta"):
            kind(width, cfg.standardise)


def accept_successor(before: config.Config, after: config.Config) -> None:
    """ValueError if a stage cannot start from the student of the stage before it."""
    with torch.device("meta"), NoInit():
        saved, expected = (build_encoder(cfg.student).state_dict() for cfg in (before, after))
    if saved.keys() >= {"pos_embed"} <= expected.keys():  # which is resized
        saved["pos_embed"] = expected["pos_embed"]
    if wrong := misfit(saved, expected):
        raise ValueError(
            f"student.model {after.student.model!r} cannot start from the"
            f" {before.student.model!r} of the stage before it: {wrong}"
        )


def accept_files(stage: job.Job) -> None:
    """ValueError if the run cannot use its images, feature cache or initial weights."""
    cfg = stage.cfg
    if stage.init and Path(stage.init).expanduser().exists():  # else an earlier stage writes it
        with torch.device("meta"), NoInit():
            encoder = build_encoder(cfg.student)
        warm_start.start_encoder(stage.init, encoder)
    specs = filter(None, (cfg.data.train, cfg.data.val))
    unindexed = [path for spec in specs for path, _ in data_spec.parts(spec) if not listed(path)]
    if unindexed:
        console.say(f"not checked, since its tar shards have no index yet: {unindexed[0]}")
        return
    train, val = image_sets.find_images(cfg)
    setup.check_validation(cfg, train, val)
    probes.check(cfg, train, val)
    setup.open_cache(cfg, train)


def listed(path: Path) -> bool:
    """True if the samples of a source can be listed without writing an index."""
    if path.is_dir():
        return not any(path.glob("*.tar")) or (path / shards.INDEX).is_file()
    return path.suffix != ".tar" or path.with_suffix(".tar.index.npz").is_file()
