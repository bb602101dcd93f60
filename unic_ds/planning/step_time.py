"""Estimates the time of a step's kernels on a GPU, and of Python to launch them, from counts.

    products, attention, the ladder's kernels    FLOPs / a fraction of the GPU's peak
    all other kernels                            bytes moved / a fraction of the memory bandwidth
    DALI's kernels                               pixels decoded, and bytes as above
    host                                         a constant cost per operator, hook and step

`planning.trace` counts FLOPs, bytes and operators; `gpus.Efficiency` and the constants below are
their rates. A step takes as long as the slower of GPU and host.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

from unic_ds import config
from unic_ds.config.ds_config import DeepSpeedSettings
from unic_ds.planning.counters import Work
from unic_ds.planning.gpus import Efficiency, Gpu
from unic_ds.planning.trace import Trace

HALF = 300
"""Patch tokens of a micro batch at which kernels reach half their rate; assumed. Of 2,304 tokens,
tiles of 128 x 128 fill 132 multiprocessors 1.6 to 4.4 times: the last wave leaves 10-20 % idle."""
RECOMPUTE_ALL = 0.16  # of the ladder's FLOPs (kernels/README.md)

PIXELS = 500 * 375  # of a training image, as ImageNet's are
DECODED = 1e9  # pixels that nvJPEG decodes in a second of the whole GPU; assumed
FP32_PIXEL, BYTE_PIXEL = 12, 3  # bytes per pixel: between two passes of a kernel, in an image

FORWARD_S, BACKWARD_S = 25e-6, 30e-6  # host seconds per operator
HOOK_S = 96e-6  # per trained tensor in a backward under ZeRO
STEP_S = 25e-3  # of DeepSpeed's step
"""Measured on a CPU, where kernels cost next to nothing: docs/scaling.md."""
WAIT_S = 8.5e-3
"""Seconds for which the GPU idles after the host has waited for it, as under offload: the update
and the next kernels are not launched yet. Estimated: 5 to 12 ms."""


class Seconds(NamedTuple):
    """Seconds of compute-bound kernels (products, attention) and of memory-bound ones."""

    products: float
    moved: float

    @property
    def all(self) -> float:
        """Time of all kernels."""
        return self.products + self.moved


def of_work(
    work: Work, gpu: Gpu, rate: Efficiency, *, fused: bool = False, share: float | None = None
) -> Seconds:
    """Seconds of kernels; a measured `share` of the peak replaces all other rates.

    `fused`: operators between two products are one kernel.
    """
    peak = gpu.tflops * 1e12
    if share is not None:
        return Seconds(work.flops / (peak * share), 0.0)
    rates = ((work.matmul, rate.matmul), (work.attention, rate.attention))
    pairs = (*rates, (work.ladder, rate.ladder))
    products = sum(flops / (peak * fraction) for flops, fraction in pairs)
    moved = work.moved_fused if fused else work.moved
    return Seconds(products, moved / (gpu.memory_gb_s * 1e9 * rate.memory))


def ladder_backwards(cfg: config.Config) -> int:
    """Backward passes of the ladder in a micro batch: one, and one to compare gradients."""
    return 1 + cfg.balance.compares_gradients


def kernels(
    cfg: config.Config, traced: Trace, gpu: Gpu, rate: Efficiency, recomputed: float
) -> dict[str, Seconds]:
    """Seconds of a micro batch's kernels by part; `recomputed` FLOPs of the encoder run twice."""
    tokens, work = traced.images * traced.tokens, traced.work
    compiled, student = cfg.run.compiles("student"), rate.student
    each = [found for name, found in work.items() if name.startswith("teacher ")]
    teachers = reduce(lambda a, b: a.combine(lambda x, y: x + y, b), each, Work())
    forward, ladder = work["encoder forward"], work["ladder forward"].ladder
    # The fused ladder's backward skips dropped pairs; that of plain torch is counted in full.
    passes = ladder_backwards(cfg)
    skipping = Work(ladder=2 * (cfg.kept_share + passes - 1) * ladder)
    backward = work["ladder backward"].times(passes).combine(max, skipping)
    again = forward.times(recomputed / forward.flops)
    if cfg.ladder.activation_checkpointing == "all":
        again = again.combine(max, Work(ladder=3 * RECOMPUTE_ALL * ladder))
    fused = cfg.run.compiles("teachers")
    found = {
        "teachers": of_work(teachers, gpu, rate, fused=fused, share=rate.teachers),
        "encoder forward": of_work(forward, gpu, rate, fused=compiled, share=student),
        "encoder backward": of_work(
            work["encoder backward"], gpu, rate, fused=compiled, share=student
        ),
        "ladder forward": of_work(work["ladder forward"], gpu, rate),
        "ladder backward": of_work(backward, gpu, rate),
        "recomputation": of_work(again, gpu, rate, fused=compiled, share=student),
    }
    slower = (tokens + HALF) / tokens
    return {part: Seconds(*(slower * x for x in pair)) for part, pair in found.items()}


def dali(cfg: config.Config, traced: Trace, gpu: Gpu, rate: Efficiency) -> float:
    """Seconds of DALI's kernels for a micro batch, which share the GPU with the step's.

    Decoding costs time per pixel. Resizing reads the crop, and writes and reads an fp32 image
    between its two passes, as blur does; colour, blur and solarisation read and write uint8 images.
    """
    if cfg.data.backend == "torch":  # it decodes on the CPU
        return 0.0
    crop = PIXELS * (1 + cfg.data.crop_min) / 2
    nbytes = 0.0
    for side in traced.sizes:
        nbytes += BYTE_PIXEL * (crop + 3 * side**2)  # read, written, and copied by torch
        nbytes += 2 * FP32_PIXEL * side * crop**0.5
        if cfg.data.augment == "unic":
            passes = cfg.data.jitter + cfg.data.solarise + cfg.data.blur
            nbytes += side**2 * (2 * BYTE_PIXEL * passes + 2 * FP32_PIXEL * cfg.data.blur)
    moved = nbytes / (gpu.memory_gb_s * 1e9 * rate.memory)
    return traced.images * (PIXELS / DECODED + moved)


def host(
    cfg: config.Config, settings: DeepSpeedSettings, traced: Trace, recomputed: float
) -> dict[str, float]:
    """Seconds of Python to launch an optimiser step, by part; `recomputed` as for `kernels`."""

    def operators(names: list[str], what: str) -> float:
        fused = cfg.run.compiles(what)
        works = (traced.work[name] for name in names)
        return sum(work.launches_fused if fused else work.launches for work in works)

    teachers = [name for name in traced.work if name.startswith("teacher ")]
    ladder = {way: traced.work[f"ladder {way}"].launches for way in ("forward", "backward")}
    encoder = operators(["encoder forward"], "student")
    again = encoder * recomputed / traced.work["encoder forward"].flops
    backward = operators(["encoder backward"], "student") + ladder["backward"]
    micro = {
        "teachers": FORWARD_S * operators(teachers, "teachers"),
        "student forward": FORWARD_S * (encoder + ladder["forward"]),
        "student backward": BACKWARD_S * backward,
        "recomputation": FORWARD_S * again,
        "ZeRO's hooks": HOOK_S * traced.matrices if settings.stage else 0.0,
    }
    return {part: settings.accumulation * s for part, s in micro.items()} | {"step": STEP_S}
