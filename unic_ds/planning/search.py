"""Plans of a run's stages, and a search for the settings that fit its GPUs and are fastest."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

from unic_ds.config import Config, ds_config, job
from unic_ds.models.encoder import grid_of, grids_of
from unic_ds.planning import estimate, multi_resolution
from unic_ds.planning.gpus import Efficiency, Gpu
from unic_ds.planning.trace import Trace, between, trace

MICRO = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CHECKPOINTS = ("none", "every:2", "full")
FEW, MANY = 8, 64
"""Micro batches that a search traces; others are on the line through them, since peaks grow
faster at large ones."""


def plan_stages(
    cfg: Config,
    file: dict[str, Any],
    gpu: Gpu,
    count: int,
    *,
    images: int,
    efficiency: Efficiency,
) -> list[estimate.Plan]:
    """Plan each stage of a run on `count` GPUs; `images` is the length of an epoch."""
    found = []
    for stage, _ in job.staged(cfg, Path()):
        settings = ds_config.merge(file, stage, count)
        trace_of = partial(trace, bf16=settings.bf16)
        found.append(
            multi_resolution.make(
                stage, settings, trace_of, gpu, count, per_epoch=images, efficiency=efficiency
            )
        )
    return found


def search(
    cfg: Config,
    file: dict[str, Any],
    gpu: Gpu,
    count: int,
    *,
    images: int,
    efficiency: Efficiency,
) -> list[estimate.Plan]:
    """Plans of the last stage that fit `count` GPUs, the fastest first.

    Teachers' weights are sharded or offloaded, and the optimiser is offloaded, only if it does not
    fit without, in this order.
    """
    dtype = ds_config.merge(file, cfg, count).bf16
    found = []
    for which, (stage, micro) in product(CHECKPOINTS, candidates(cfg, file, count)):
        for placement, offload in product(placements(cfg), (False, True)):
            chosen = replace(cfg, student=replace(cfg.student, activation_checkpointing=which))
            if placement:
                chosen = with_placement(chosen, placement)
            settings = ds_config.merge(
                with_zero_stage(file, stage, micro, offload=offload), chosen, count
            )
            trace_of = partial(trace_between, bf16=dtype)
            row = multi_resolution.make(
                chosen, settings, trace_of, gpu, count, per_epoch=images, efficiency=efficiency
            )
            if row.fits:
                found.append(row)
                break
    return sorted(found, key=lambda p: -p.images_per_s)


def trace_between(cfg: Config, images: int, *, bf16: bool) -> Trace:
    """The trace of a micro batch, on the line through those of `FEW` and `MANY` images."""
    few, many = (trace(cfg, n, bf16=bf16) for n in (FEW, MANY))
    return between(few, many, images)


def candidates(cfg: Config, file: dict[str, Any], gpus: int) -> list[tuple[int, int]]:
    """Pairs of a ZeRO stage and a micro batch that divides the batch."""
    whole = cfg.run.compiles("student") or cfg.balance.compares_gradients
    stages = (1, 2) if whole else (1, 2, 3)
    micros = [micro for micro in MICRO if cfg.optim.batch_size % (micro * gpus) == 0]
    largest, usual = max(grids_of(cfg)), grid_of(cfg.student)
    if cfg.data.tokens:  # which decide the micro batches
        micros = micros[:1]
    elif cfg.data.sizes:
        micros = [micro for micro in micros if micro * usual**2 >= largest**2]
    return list(product(stages, micros))


def placements(cfg: Config) -> list[Literal["", "shard", "offload"]]:
    """Placements of all teachers' weights to try; empty: those of the Config."""
    movable = not any(
        row.quantised or row.channels_last or (cfg.data.sizes and not row.own_side)
        for row in cfg.teachers
    )
    return ["", "shard", "offload"] if movable else [""]


def with_placement(cfg: Config, placement: Literal["shard", "offload"]) -> Config:
    """The Config with that placement of all teachers' weights."""
    rows = tuple(replace(row, placement=placement) for row in cfg.teachers)
    return replace(cfg, teachers=rows)


def with_zero_stage(
    file: dict[str, Any], stage: int, micro: int, *, offload: bool
) -> dict[str, Any]:
    """A ds_config of another stage and micro batch; `offload` puts its optimiser on the CPU."""
    zero = file.get("zero_optimization", {}) | {"stage": stage}
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    made = file | {"train_micro_batch_size_per_gpu": micro, "zero_optimization": zero}
    if stage < 2:  # DeepSpeed refuses data_types below ZeRO-2
        made.pop("data_types", None)
    return made
