"""`unic-ds plan`: whether a run fits its GPUs, how long it takes, and what would suit it best."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from unic_ds import config
from unic_ds.config import Config, ds_config, job, overrides
from unic_ds.config.data import IMAGENET
from unic_ds.planning import estimate, gpus
from unic_ds.planning.gpus import Efficiency, Gpu

MICRO = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CHECKPOINTS = ("none", "every:2", "full")
SHOWN = 8  # of what a search finds
PACE = ("GB", "img/s", "MFU", "days", "bound")  # columns behind those of what was chosen
FEW, MANY = 8, 64  # micro batches that a search traces: peaks grow faster where they are large
VERB_OPTIONS = ("gpus", "gpu", "ds_config", "images", "efficiency", "search", "json")


def run(own: dict[str, str], cfg: Config) -> int:
    """The verb: print what its options ask for; exit code 1 where the run does not fit."""
    gpu = gpus.get(own.get("gpu", "h100-80"))
    count, images = (
        int(overrides.coerce(int, own.get(name, str(default)), f"--{name}"))
        for name, default in (("gpus", gpu.per_node), ("images", IMAGENET))
    )
    for name, value in (("gpus", count), ("images", images)):
        config.check(value > 0, f"--{name}", "positive", value)
    if not cfg.teachers:
        raise ValueError("plan needs teachers; a --recipe has some")
    file = ds_config.read(own.get("ds_config", "ds_configs/zero2.json"))
    rates = Efficiency.parse(own.get("efficiency", ""))
    accept(cfg)
    given: dict[str, Any] = {"images": images, "efficiency": rates}
    if "search" in own:
        found = search(cfg, file, gpu, count, **given)
        if not found:
            raise RuntimeError(f"nothing fits {count} x {gpu.name}; take more or larger GPUs")
        show_found(found, as_json="json" in own)
        return 0
    plans = stages(cfg, file, gpu, count, **given)
    show(plans, as_json="json" in own)
    return 0 if all(row.fits for row in plans) else 1


def accept(cfg: Config) -> None:
    """ValueError for models that a training command would be refused for, of any stage."""
    from unic_ds.training import acceptance

    acceptance.accept_models([stage for stage, _ in job.staged(cfg, Path())])


def stages(
    cfg: Config,
    file: dict[str, Any],
    gpu: Gpu,
    count: int,
    *,
    images: int,
    efficiency: Efficiency,
) -> list[estimate.Plan]:
    """A plan for each stage of a run."""
    from unic_ds.planning.trace import trace

    found = []
    for stage, _ in job.staged(cfg, Path()):
        settings = ds_config.merge(file, stage, count)
        traced = trace(stage, settings.micro_batch, bf16=settings.bf16)
        found.append(
            estimate.make(
                stage, settings, traced, gpu, count, per_epoch=images, efficiency=efficiency
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
    """What fits of the last stage, the fastest first.

    Weights of teachers are spread, and the optimiser is offloaded, only where it does not fit
    without, in this order.
    """
    from unic_ds.planning.trace import between, trace

    dtype = ds_config.merge(file, cfg, count).bf16
    found = []
    for which, (stage, micro) in product(CHECKPOINTS, candidates(cfg, file, count)):
        for placement, offload in product(placements(cfg), (False, True)):
            chosen = replace(cfg, student=replace(cfg.student, activation_checkpointing=which))
            if placement:
                chosen = placed(chosen, placement)
            settings = ds_config.merge(variant(file, stage, micro, offload=offload), chosen, count)
            few, many = (trace(chosen, n, bf16=dtype) for n in (FEW, MANY))
            traced = between(few, many, micro)
            row = estimate.make(
                chosen, settings, traced, gpu, count, per_epoch=images, efficiency=efficiency
            )
            if row.fits:
                found.append(row)
                break
    return sorted(found, key=lambda p: -p.images_per_s)


def candidates(cfg: Config, file: dict[str, Any], gpus: int) -> list[tuple[int, int]]:
    """ZeRO stages, and micro batches that divide the batch."""
    stages = (1, 2) if cfg.run.compiles("student") else (1, 2, 3)
    micros = [micro for micro in MICRO if cfg.optim.batch_size % (micro * gpus) == 0]
    return list(product(stages, micros))


def placements(cfg: Config) -> list[Literal["", "shard", "offload"]]:
    """Where all teachers' weights may lie; an empty one is where the run has them."""
    spread = not any(row.quantised or row.channels_last for row in cfg.teachers)
    return ["", "shard", "offload"] if spread else [""]


def placed(cfg: Config, placement: Literal["shard", "offload"]) -> Config:
    """The Config with all teachers' weights there."""
    rows = tuple(replace(row, placement=placement) for row in cfg.teachers)
    return replace(cfg, teachers=rows)


def variant(file: dict[str, Any], stage: int, micro: int, *, offload: bool) -> dict[str, Any]:
    """A ds_config of another stage and micro batch, its optimiser offloaded or as it was."""
    zero = file.get("zero_optimization", {}) | {"stage": stage}
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    made = file | {"train_micro_batch_size_per_gpu": micro, "zero_optimization": zero}
    if stage < 2:  # which refuses it
        made.pop("data_types", None)
    return made


def show(found: list[estimate.Plan], *, as_json: bool) -> None:
    """Print the plans of a run's stages."""
    if as_json:
        print(json.dumps([as_dict(row) for row in found]))
        return
    from rich.console import Console

    console = Console()
    for number, row in enumerate(found, 1):
        of = f"stage {number} of {len(found)}: " if len(found) > 1 else ""
        each = f"micro batch {row.micro_batch} x {row.accumulation}"
        console.print(f"{of}{row.gpus} x {row.gpu}, ZeRO-{row.zero_stage}, {each}\n")
        console.print(table("memory of a GPU", "GB", row.memory_gb, row.needs_gb))
        console.print(table("FLOPs of an image", "TFLOP", row.tflop_per_image))
        console.print(table("an optimiser step", "s", row.seconds))
        console.print(table("of it, moving bytes alone", "s", row.moved_seconds))
        console.print(table("the host, to queue it", "s", row.host_seconds))
        verdict = "fits" if row.fits else "does NOT fit"
        console.print(f"{row.needs_gb:.1f} of {row.room_gb:.1f} GB: {verdict}")
        if not row.fits:
            console.print("Add --search for what would, or take another --gpu or more --gpus.")
        pace = f"{row.images_per_s:.0f} images/s, MFU {row.mfu:.0%}"
        console.print(f"{pace}, {row.days:.1f} days for {row.steps} steps")
        sends = f"a GPU sends {row.traffic_gb:.1f} GB a step"
        stores = f"a checkpoint has {row.checkpoint_gb:.1f} GB"
        cache = f"a feature cache {row.cache_gb_per_view:.0f} GB a view"
        console.print(f"{sends}; {stores}; {cache}\n", soft_wrap=True)
    console.print("Times are predictions from assumed efficiencies (--efficiency), not measured.")


def show_found(found: list[estimate.Plan], *, as_json: bool) -> None:
    """Print what a search found."""
    if as_json:
        print(json.dumps([as_dict(row) for row in found]))
        return
    from rich.console import Console
    from rich.table import Table

    names = ("ZeRO", "micro", "accum", "checkpoint", "teachers", "optimiser")
    # Narrow enough for the 80 columns of a job's log.
    grid = Table(*names, *PACE, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for row in found[:SHOWN]:
        pace = f"{row.images_per_s:.0f}", f"{row.mfu:.0%}", f"{row.days:.1f}"
        split = str(row.zero_stage), str(row.micro_batch), str(row.accumulation), row.checkpoint
        where = ", ".join(dict.fromkeys(row.placement.values())), row.optimiser
        grid.add_row(*split, *where, f"{row.needs_gb:.1f}", *pace, row.bound)
    Console().print(grid)


def table(title: str, unit: str, rows: dict[str, float], total: float | None = None) -> Any:
    """A table of parts and their share."""
    from rich.table import Table

    whole = sum(rows.values()) if total is None else total
    grid = Table(title=title, title_justify="left", box=None, show_header=False)
    for name, value in (rows | {"in all": whole}).items():
        grid.add_row(name, f"{value:.3g} {unit}", f"{value / whole:.0%}" if whole else "")
    return grid


def as_dict(row: estimate.Plan) -> dict[str, Any]:
    """A plan as plain values."""
    return asdict(row) | {"needs_gb": row.needs_gb, "fits": row.fits, "bound": row.bound}
