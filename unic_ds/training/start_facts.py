"""Facts of the latest start of a stage, in OUT/start.json: its length, ranks, device and plan."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial

import torch

from unic_ds import dist
from unic_ds.config import Config
from unic_ds.config.ds_config import DeepSpeedSettings
from unic_ds.files.printable import printable
from unic_ds.planning import gpus, multi_resolution
from unic_ds.planning.gpus import Gpu
from unic_ds.planning.trace import trace
from unic_ds.process import console
from unic_ds.training.state import RunContext


def collect(run: RunContext) -> dict[str, object]:
    """The facts, as JSON; `planned_mfu` is among them on a GPU that the planner knows."""
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    facts: dict[str, object] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": run.steps,
        "images": run.train.per_epoch,
        "ranks": dist.world(),
        "device": device,
    }
    if not on_gpu:
        facts["cores"] = torch.get_num_threads()
    gpu = gpus.of_device(device)
    if gpu is None:
        return facts
    try:
        planned = planned_mfu(
            run.cfg, run.job.settings, gpu, ranks=dist.world(), images=run.train.per_epoch
        )
    except Exception as error:  # of a plugin's model, which only needs to train
        reason = printable(" ".join(str(error).split()))
        console.say(f"the speed is compared with no plan, since none could be made: {reason}")
        return facts
    return facts | {"planned_mfu": planned}


def planned_mfu(
    cfg: Config, settings: DeepSpeedSettings, gpu: Gpu, *, ranks: int, images: int
) -> float:
    """The planner's MFU of a run whose epochs have so many images; no random state changes."""
    with torch.random.fork_rng(devices=[]):
        trace_of = partial(trace, bf16=settings.bf16)
        return multi_resolution.make(cfg, settings, trace_of, gpu, ranks, per_epoch=images).mfu
