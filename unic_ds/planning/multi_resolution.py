"""The plan of a run whose steps draw their resolution: a plan at each side, put together.

Memory is that of the side that needs most, times are means, since all sides are drawn as often. A
teacher that draws its own side has the same mean, but for the smaller micro batches of such steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from unic_ds.config import Config
from unic_ds.config.ds_config import DeepSpeedSettings
from unic_ds.models.encoder import grids_of
from unic_ds.models.step_resolutions import StepResolutions, at_size, settings_at
from unic_ds.planning import estimate
from unic_ds.planning.estimate import Plan
from unic_ds.planning.gpus import Efficiency, Gpu
from unic_ds.planning.trace import Trace


def make(
    cfg: Config,
    settings: DeepSpeedSettings,
    trace_of: Callable[[Config, int], Trace],
    gpu: Gpu,
    gpus: int,
    *,
    per_epoch: int,
    efficiency: Efficiency | None = None,
) -> Plan:
    """The plan of a run; `trace_of` traces so many images of a run of one side.

    ValueError for sides that the student does not take or that exceed `data.tokens`. The micro
    batch of the plan is the ds_config's, `splits` has those of the sides.
    """

    def plan_of(at: Config, own: DeepSpeedSettings) -> Plan:
        traced = trace_of(at, own.micro_batch)
        return estimate.make(at, own, traced, gpu, gpus, per_epoch=per_epoch, efficiency=efficiency)

    StepResolutions(cfg, settings)
    if not cfg.data.sizes:
        return plan_of(cfg, settings)
    plans = [
        plan_of(at_size(cfg, size), settings_at(cfg, settings, grid))
        for size, grid in zip(cfg.data.sizes, grids_of(cfg), strict=True)
    ]
    cached = trace_of(at_size(cfg, cfg.student.size), settings.micro_batch)
    return replace(
        mean_of(plans),
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        cache_gb_per_view=estimate.cache_gb(cached, per_epoch=per_epoch),
    )


def mean_of(plans: Sequence[Plan]) -> Plan:
    """One plan of several, whose steps are as frequent."""
    count, days = len(plans), [plan.days for plan in plans]
    return replace(
        max(plans, key=lambda plan: plan.needs_gb),
        splits={size: split for plan in plans for size, split in plan.splits.items()},
        tflop_per_image=means([plan.tflop_per_image for plan in plans]),
        seconds=means([plan.seconds for plan in plans]),
        moved_seconds=means([plan.moved_seconds for plan in plans]),
        host_seconds=means([plan.host_seconds for plan in plans]),
        images_per_s=count / sum(1 / plan.images_per_s for plan in plans),
        mfu=sum(plan.mfu * plan.days for plan in plans) / sum(days),
        days=sum(days) / count,
    )


def means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each part."""
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
