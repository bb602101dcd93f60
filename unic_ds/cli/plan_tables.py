"""Output of `unic-ds plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from unic_ds.cli import tables

if TYPE_CHECKING:
    from unic_ds.planning.estimate import Plan

SHOWN = 8
"""Plans of a search that are printed."""
CHOICE = ("ZeRO", "micro", "accum", "checkpoint", "teachers", "optimiser")
PACE = ("GB", "img/s", "MFU", "days", "bound")


def show_stages(plans: list[Plan], *, as_json: bool) -> None:
    """Print the plans of a run's stages."""
    if as_json:
        print(json.dumps([as_dict(plan) for plan in plans]))
        return
    for number, plan in enumerate(plans, 1):
        position = f"stage {number} of {len(plans)}: " if len(plans) > 1 else ""
        several = len(plan.splits) > 1
        batch = "micro batch " + ", ".join(
            f"{micro} x {count}" + (f" at {size} px" if several else "")
            for size, (micro, count) in plan.splits.items()
        )
        print(f"{position}{plan.gpus} x {plan.gpu}, ZeRO-{plan.zero_stage}, {batch}\n")
        show_parts("memory of a GPU", "GB", plan.memory_gb, plan.needs_gb)
        show_parts("FLOPs of an image", "TFLOP", plan.tflop_per_image)
        show_parts("an optimiser step", "s", plan.seconds)
        show_parts("part of it: memory-bound kernels", "s", plan.moved_seconds)
        show_parts("the host, to launch its kernels", "s", plan.host_seconds)
        verdict = "fits" if plan.fits else "does NOT fit"
        print(f"{plan.needs_gb:.1f} of {plan.room_gb:.1f} GB: {verdict}")
        if not plan.fits:
            print("Add --search to list settings that fit, or take another --gpu or more --gpus.")
        pace = f"{plan.images_per_s:.0f} images/s, MFU {plan.mfu:.0%}"
        print(f"{pace}, {plan.days:.1f} days for {plan.steps} steps")
        sends = f"a GPU sends {plan.traffic_gb:.1f} GB a step"
        stores = f"a checkpoint has {plan.checkpoint_gb:.1f} GB"
        cache = f"a feature cache {plan.cache_gb_per_view:.0f} GB a view"
        print(f"{sends}; {stores}; {cache}\n")
    print("Times are predictions from assumed efficiencies (--efficiency), not measured.")


def show_parts(
    title: str, unit: str, amounts: dict[str, float], total: float | None = None
) -> None:
    """Print parts and their shares of a total."""
    total = sum(amounts.values()) if total is None else total
    rows = [
        (name, f"{value:.3g} {unit}", f"{value / total:.0%}" if total else "")
        for name, value in (amounts | {"in all": total}).items()
    ]
    tables.show_table(rows, title=title)


def show_search(plans: list[Plan], *, as_json: bool) -> None:
    """Print the plans of a search, narrow enough for the 80 columns of a job's log."""
    if as_json:
        print(json.dumps([as_dict(plan) for plan in plans]))
        return
    rows = []
    for plan in plans[:SHOWN]:
        split = plan.zero_stage, plan.micro_batch, plan.accumulation, plan.checkpoint
        placement = ", ".join(dict.fromkeys(plan.placement.values()))
        pace = f"{plan.images_per_s:.0f}", f"{plan.mfu:.0%}", f"{plan.days:.1f}", plan.bound
        rows.append((*split, placement, plan.optimiser, f"{plan.needs_gb:.1f}", *pace))
    tables.show_table(rows, header=(*CHOICE, *PACE), compact=True)


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    return asdict(plan) | {"needs_gb": plan.needs_gb, "fits": plan.fits, "bound": plan.bound}
