"""Time Python needs to queue operators, measured on models of full depth and little width.

Usage: `deepspeed --num_gpus 1 tests/support/host_cost.py`. The image has two by two patches, so
kernels cost next to nothing. Prints one JSON object, medians of the main thread's CPU time in ms
or us: forward of UNIC-L's teachers, forward and backward of its student's encoder, plain and
through DeepSpeed's engine, and the optimiser's step.
On a GPU the times have the launches of kernels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import deepspeed
import open_clip
import timm
import torch
from ds_settings import ds_settings
from torch import Tensor, nn

from unic_ds.planning.counters import Meter

NARROW: dict[str, Any] = {"embed_dim": 96, "num_heads": 4, "img_size": 28, "num_classes": 0}
SETTINGS = ds_settings(
    1,
    {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    bf16={"enabled": True, "check_grad_overflow": False},
    communication_data_type="fp32",
    data_types={"grad_accum_dtype": "fp32"},
)
ROUNDS = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def median_ms(*calls: Callable[[], Any]) -> list[float]:
    """Median milliseconds of calls that are made in turn."""
    rounds = []
    for _ in range(ROUNDS):
        marks = [time.thread_time()]
        for call in calls:
            call()
            marks.append(time.thread_time())
        rounds.append([1e3 * (b - a) for a, b in pairwise(marks)])
    return [median(column) for column in zip(*rounds, strict=True)]


def launches(call: Callable[[], Any]) -> float:
    """Kernels that a call launches."""
    with Meter(()) as meter:
        call()
    return meter.work().launches


def forward(name: str, model: nn.Module, image_B3HW: Tensor) -> dict[str, float]:
    """Forward of a frozen model."""

    @torch.no_grad()
    def call() -> None:
        model(image_B3HW)

    (ms,) = median_ms(call)
    count = launches(call)
    return {f"{name} forward": ms, f"{name} forward, us an operator": 1e3 * ms / count}


def student() -> nn.Module:
    """UNIC-L's encoder, narrow."""
    made: nn.Module = timm.create_model("vit_large_patch14_224", **NARROW)
    return made.to(DEVICE, torch.bfloat16)


def plain(image_B3HW: Tensor) -> dict[str, float]:
    """Forward and backward of the student's encoder."""
    model, kept = student(), list[Tensor]()
    calls = (lambda: kept.append(model(image_B3HW).sum()), lambda: kept.pop().backward())
    counts = [launches(call) for call in calls]
    found: dict[str, float] = {}
    for name, ms, count in zip(("forward", "backward"), median_ms(*calls), counts, strict=True):
        found |= {f"student {name}": ms, f"student {name}, us an operator": 1e3 * ms / count}
    return found


def through_deepspeed(image_B3HW: Tensor) -> dict[str, float]:
    """The same through DeepSpeed's engine, and its step."""
    deepspeed.init_distributed("nccl" if DEVICE == "cuda" else "gloo")
    optimizer = torch.optim.AdamW((model := student()).parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    kept = list[Tensor]()
    ms = median_ms(
        lambda: kept.append(engine(image_B3HW).sum()),
        lambda: engine.backward(kept.pop()),
        engine.step,
    )
    torch.distributed.destroy_process_group()
    names = ("student forward by ZeRO-2", "student backward by ZeRO-2", "step")
    return dict(zip(names, ms, strict=True)) | {"parameters": len(list(model.parameters()))}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    image_B3HW = torch.zeros(1, 3, 28, 28, dtype=torch.bfloat16, device=DEVICE)
    giant = timm.create_model("vit_giant_patch14_dinov2", **NARROW)
    huge = open_clip.transformer.VisionTransformer(
        image_size=28,
        patch_size=14,
        width=96,
        layers=32,
        heads=4,
        mlp_ratio=4,
        output_dim=96,
        act_layer=open_clip.transformer.QuickGELU,
    )
    torch.backends.mha.set_fastpath_enabled(False)
    found: dict[str, float] = {}
    for name, model in (("DINOv2-g", giant), ("MetaCLIP-H", huge)):
        found |= forward(name, model.to(DEVICE, torch.bfloat16).eval(), image_B3HW)
    found |= plain(image_B3HW) | through_deepspeed(image_B3HW)
    hooks = found["student backward by ZeRO-2"] - found["student backward"]
    found["hooks, us a parameter"] = 1e3 * hooks / found["parameters"]
    print(json.dumps({name: round(value, 1) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
