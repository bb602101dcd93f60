"""Memory, communication and time of a run before it is queued: arithmetic on a traced step.

Memory per GPU under ZeRO stage s of W ranks, P trained and F frozen weights of the student, b bytes
a weight (2 in bf16, 4 in fp32), as DeepSpeed holds it (test_estimate.py measures it):

    weights     (P + F) b,  of W under s = 3
    masters     4 P,        of W under s >= 1; in fp32 under s = 0 the weights themselves
    moments     8 P (12 P with an average), of W under s >= 1
    gradients   b P,        of W under s >= 2

Time is that of the kernels (`step_time`), plus the communication that backward does not hide; or
the host's, if Python takes longer to queue them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unic_ds import config
from unic_ds.config import ds_config
from unic_ds.planning import step_time
from unic_ds.planning.gpus import Efficiency, Gpu

if TYPE_CHECKING:  # for it knows torch, and a wrong option is told before
    from unic_ds.planning.trace import Trace

CONTEXT_GB = 2.0  # CUDA, NCCL and cuBLAS work spaces
CACHE = 0.04  # what the caching allocator cannot use, of what is live
FP32 = 4  # bytes
CPU_GB_S = 200  # memory bandwidth of a node's CPUs, which its ranks share; assumed
UPDATE = 34  # bytes that AdamW reads and writes for a weight
BUSY = ("teachers", "encoder", "ladder", "recomputation")
HIDDEN_HOST = "host not hidden"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need and how fast it may be; memory and bytes are of one GPU."""

    gpu: str
    gpus: int
    zero_stage: int
    micro_batch: int
    checkpoint: str  # the student's blocks that are recomputed
    accumulation: int
    placement: dict[str, str]  # of each teacher's weights
    optimiser: str  # GPU or CPU
    memory_gb: dict[str, float]  # by kind
    room_gb: float  # of the GPU
    tflop_per_image: dict[str, float]
    traffic_gb: float  # that a GPU sends in an optimiser step
    seconds: dict[str, float]  # of an optimiser step, by part
    moved_seconds: dict[str, float]  # of them, kernels that only move bytes
    host_seconds: dict[str, float]  # that Python takes to queue an optimiser step
    images_per_s: float
    mfu: float
    days: float
    steps: int
    checkpoint_gb: float
    cache_gb_per_view: float

    @property
    def needs_gb(self) -> float:
        """Memory of a GPU, all kinds."""
        return sum(self.memory_gb.values())

    @property
    def fits(self) -> bool:
        """True if it fits."""
        return self.needs_gb <= self.room_gb

    @property
    def bound(self) -> str:
        """The slower of the two, which decides a step's time: host or GPU."""
        return "host" if self.seconds[HIDDEN_HOST] else "GPU"


def kinds(settings: dict[str, Any], traced: Trace, world: int, *, ema: bool) -> dict[str, float]:
    """Bytes that a rank holds between steps: weights, gradients, optimiser (see above)."""
    stage = ds_config.stage(settings)
    bf16, b = ds_config.bf16(settings), weight_bytes(settings)
    trained, frozen = traced.encoder + traced.ladder, traced.frozen
    masters = FP32 * trained if bf16 or stage else 0
    moments = (3 if ema else 2) * FP32 * trained
    return {
        "weights": (trained + frozen) * b / (world if stage == 3 else 1),
        "gradients": trained * (FP32 if sums_fp32(settings) else b) / (world if stage >= 2 else 1),
        "optimiser": (masters + moments) / (world if stage else 1),
    }


def weight_bytes(settings: dict[str, Any]) -> int:
    """Bytes of a weight that the student computes with."""
    return 2 if ds_config.bf16(settings) else FP32


def sums_fp32(settings: dict[str, Any]) -> bool:
    """Whether gradients are kept and accumulated in fp32 where weights are bf16."""
    return (settings.get("data_types") or {}).get("grad_accum_dtype") == "fp32"


def buffers(settings: dict[str, Any], traced: Trace) -> float:
    """Bytes of DeepSpeed's buckets, and of weights that ZeRO-3 has gathered."""
    zero = settings.get("zero_optimization", {})
    stage, b = ds_config.stage(settings), weight_bytes(settings)
    trained = traced.encoder + traced.ladder
    if stage == 0:
        return 0.0
    if stage < 3:  # weights are gathered in place; a bucket is flattened, and cast to be summed
        bucket, cast = min(zero.get("reduce_bucket_size", 5e8), trained), summed_bytes(settings)
        return reduce_buckets(settings) + bucket * (b + (cast if cast != b else 0))
    gathered = min(zero.get("stage3_max_live_parameters", 1e9), trained)
    return zero.get("reduce_bucket_size", 5e8) * FP32 + gathered * b


def keeps_gathered(settings: dict[str, Any], traced: Trace) -> bool:
    """Whether ZeRO-3 gathers weights once a micro batch: what forward gathers waits for backward.

    Prefetching runs ahead as far as weights may be live, and what it meets there it keeps; else a
    weight is kept that is wanted again within a distance. A pass back and forth meets all twice.
    """
    zero, trained = settings["zero_optimization"], traced.encoder + traced.ladder
    if zero.get("stage3_prefetch_bucket_size", 5e7):
        return trained <= zero.get("stage3_max_live_parameters", 1e9)
    return 2 * trained <= zero.get("stage3_max_reuse_distance", 1e9)


def reduce_buckets(settings: dict[str, Any]) -> float:
    """Bytes of the buckets in which ZeRO-1 and 2 reduce gradients: two where they overlap."""
    zero = settings["zero_optimization"]
    size = zero.get("reduce_bucket_size", 5e8)
    return size * weight_bytes(settings) * (2 if zero.get("overlap_comm") else 1)


def summed_bytes(settings: dict[str, Any]) -> int:
    """Bytes of a gradient while ranks sum it."""
    asked = settings.get("communication_data_type")
    return FP32 if asked == "fp32" else weight_bytes(settings)


def memory(
    settings: dict[str, Any], cfg: config.Config, traced: Trace, world: int, *, node: int
) -> dict[str, float]:
    """GB of a rank by kind, at its fullest moment; a node has `node` GPUs."""
    held = kinds(settings, traced, world, ema=bool(cfg.optim.ema))
    if offloaded(settings, "optimizer"):
        held["optimiser"] = 0.0
        if ds_config.stage(settings) > 1:  # ZeRO-1 keeps them on the GPU until the step
            held["gradients"] = 0.0
    if offloaded(settings, "param"):
        held["weights"] = 0.0
    kept = sum(traced.kept.values())
    working = max(traced.teachers_peak, traced.step_peak - kept)
    found = held | {
        "activations: encoder": traced.kept.get("encoder", 0),
        "activations: ladder, loss": traced.kept.get("ladder and loss", 0),
        "working memory": working,
        "teachers": teachers(cfg, traced, min(world, node)),
        "targets": traced.targets,
        "buffers": buffers(settings, traced),
    }
    found = {name: nbytes / 1e9 for name, nbytes in found.items()}
    return found | {"CUDA, NCCL, allocator": CONTEXT_GB + CACHE * sum(found.values())}


def offloaded(settings: dict[str, Any], what: str) -> bool:
    """Whether the optimizer's state, or the weights ("param"), wait in the CPU's memory."""
    asked = settings.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return asked.get("device") not in (None, "none")


def teachers(cfg: config.Config, traced: Trace, node: int) -> float:
    """Bytes of the teachers' weights on one of a node's `node` GPUs."""
    share = {"replicate": 1.0, "shard": 1 / node, "offload": 0.0}
    return sum(traced.teachers[row.name][1] * share[row.placement] for row in cfg.teachers)


def flops_per_image(cfg: config.Config, traced: Trace, stage: int) -> dict[str, float]:
    """FLOPs of an image's step by part; the ladder's own backward skips what teacher dropping
    drops.

    Recomputation is what backward does of the forward again.
    """
    per = {name: value / traced.images for name, value in traced.flops.items()}
    teachers = sum(value for name, value in per.items() if name.startswith("teacher "))
    forward, ladder = per["encoder forward"], per["ladder forward"]
    own = traced.work["ladder forward"].ladder / traced.images  # by kernels that skip
    again = 3 * step_time.RECOMPUTE_ALL if cfg.ladder.recompute == "all" else 0.0
    return {
        "teachers": teachers,
        "encoder": 3 * forward,
        "ladder": 3 * ladder - 2 * own * (1 - step_time.kept_share(cfg)),
        "recomputation": recomputed(traced, stage) / traced.images + again * own,
    }


def recomputed(traced: Trace, stage: int) -> float:
    """FLOPs of the encoder's blocks that backward computes again."""
    return traced.flops["recomputed under ZeRO-3" if stage == 3 else "recomputed"]


def traffic(
    settings: dict[str, Any], traced: Trace, world: int, accumulation: int
) -> tuple[float, float]:
    """Bytes that a rank sends in an optimiser step, by rings: (of gradients, of weights).

    ZeRO-1 and 2 sum a bucket on all ranks, not on the ranks that keep its parts, which sends twice
    as much, unless the ds_config turns `use_multi_rank_bucket_allreduce` off.
    """
    stage, zero = ds_config.stage(settings), settings.get("zero_optimization", {})
    part = (world - 1) / world * (traced.encoder + traced.ladder)
    gradients, weights = part * summed_bytes(settings), part * weight_bytes(settings)
    if stage == 3:
        gathers = 1 if keeps_gathered(settings, traced) else 2
        return accumulation * gradients, accumulation * gathers * weights
    scatters = zero.get("reduce_scatter", True)
    if not stage or not scatters or zero.get("use_multi_rank_bucket_allreduce", True):
        gradients *= 2
    return gradients * (accumulation if stage == 2 else 1), weights if stage else 0.0


def exposed(
    settings: dict[str, Any],
    gradients: float,
    weights: float,
    backward: float,
    overlap: float,
    last: float,
) -> float:
    """Seconds for which a rank waits on communication that takes so long of each kind.

    Gradients may hide behind backward, ZeRO-3's weights too, but for the share of the `last`
    bucket, which is full when backward ends; ZeRO-1 and 2 gather weights after the step, when
    nothing else runs. ZeRO-1 sums gradients in the last backward alone.
    """
    stage = ds_config.stage(settings)
    beside, after = (gradients + weights, 0.0) if stage == 3 else (gradients, weights)
    if stage < 2:
        backward /= settings["gradient_accumulation_steps"]
    if stage and settings["zero_optimization"].get("overlap_comm", stage == 3):
        beside = max(last * gradients, beside - overlap * backward)
    return beside + after


def last_bucket(settings: dict[str, Any], traced: Trace) -> float:
    """Share of the gradients in the bucket that backward fills last."""
    trained = traced.encoder + traced.ladder
    size = settings.get("zero_optimization", {}).get("reduce_bucket_size", 5e8)
    return (trained % size or size) / trained if size < trained else 1.0


def gathering(cfg: config.Config, traced: Trace, gpu: Gpu, gpus: int, rate: Efficiency) -> float:
    """Seconds in which a micro batch's spread teachers come to a rank, nothing hidden."""
    node = min(gpus, gpu.per_node)
    seconds = 0.0
    for row in cfg.teachers:
        nbytes = traced.teachers[row.name][1] * -(-traced.images // (row.micro or traced.images))
        if row.placement != "replicate":
            seconds += nbytes * (node - 1) / node / (gpu.node_gb_s * 1e9 * rate.links)
        if row.placement == "offload":
            seconds += nbytes / node / (gpu.host_gb_s * 1e9 * rate.links)
    return seconds


def crossing(
    settings: dict[str, Any], traced: Trace, gpu: Gpu, gpus: int, rate: Efficiency
) -> tuple[float, float]:
    """(seconds on PCIe, of the CPUs' AdamW) of an optimiser step whose state or weights wait there.

    Gradients go there and weights come back once; offloaded weights come for each forward and each
    backward.
    """
    trained = traced.encoder + traced.ladder
    share = trained / (gpus if ds_config.stage(settings) else 1)
    b, pcie, adam = weight_bytes(settings), 0.0, 0.0
    if offloaded(settings, "optimizer"):
        pcie += (FP32 + b) * share
        adam = UPDATE * share * min(gpus, gpu.per_node) / (CPU_GB_S * 1e9)
    if offloaded(settings, "param"):
        pcie += 2 * settings["gradient_accumulation_steps"] * b * share
    return pcie / (gpu.host_gb_s * 1e9 * rate.links), adam


def speed(gpu: Gpu, gpus: int, rate: Efficiency) -> float:
    """Bytes a second that a rank sends in a ring of all."""
    link = gpu.node_gb_s
    if gpus > gpu.per_node:  # a ring crosses nodes through all of a node's adapters
        link = min(link, gpu.net_gb_s * gpu.per_node)
    return link * 1e9 * rate.links


def step_seconds(
    cfg: config.Config,
    settings: dict[str, Any],
    traced: Trace,
    gpu: Gpu,
    gpus: int,
    rate: Efficiency,
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of an optimiser step by part, and those of kernels that only move bytes."""
    accumulation, stage = settings["gradient_accumulation_steps"], ds_config.stage(settings)
    kernels = step_time.kernels(cfg, traced, gpu, rate, recomputed(traced, stage))
    all_of: dict[str, float] = dict.fromkeys(BUSY, 0.0)
    moved = dict(all_of)
    for name, own in kernels.items():
        part = name.partition(" ")[0]
        all_of[part] += accumulation * own.all
        moved[part] += accumulation * own.moved
    backward = accumulation * (kernels["encoder backward"].all + kernels["ladder backward"].all)
    gradients, weights = (
        nbytes / speed(gpu, gpus, rate) for nbytes in traffic(settings, traced, gpus, accumulation)
    )
    last = last_bucket(settings, traced)
    trained = traced.encoder + traced.ladder
    update = UPDATE * trained / (gpus if stage else 1) / (gpu.memory_gb_s * 1e9)
    gathers = accumulation * gathering(cfg, traced, gpu, gpus, rate)
    pcie, adam = crossing(settings, traced, gpu, gpus, rate)
    busy = all_of | {
        "DALI": accumulation * step_time.dali(cfg, traced, gpu, rate),
        "communication not hidden": exposed(
            settings, gradients, weights, backward, rate.overlap, last
        ),
        "teachers' weights not hidden": max(0.0, gathers - rate.overlap * all_of["teachers"]),
        "PCIe": pcie,
        "update": adam or update,
        "waits for the GPU": step_time.WAIT_S if pcie else 0.0,
    }
    queueing = sum(step_time.host(cfg, settings, traced, recomputed(traced, stage)).values())
    return busy | {HIDDEN_HOST: max(0.0, queueing - sum(busy.values()))}, moved


def make(
    cfg: config.Config,
    settings: dict[str, Any],
    traced: Trace,
    gpu: Gpu,
    gpus: int,
    *,
    per_epoch: int,
    efficiency: Efficiency | None = None,
) -> Plan:
    """The plan of a run on `gpus` GPUs; `settings` are merged, `traced` is of their micro batch."""
    micro = settings["train_micro_batch_size_per_gpu"]
    accumulation, stage = settings["gradient_accumulation_steps"], ds_config.stage(settings)
    assert traced.images == micro
    seconds, moved = step_seconds(cfg, settings, traced, gpu, gpus, efficiency or Efficiency())
    total, batch = sum(seconds.values()), micro * accumulation * gpus
    per_image = flops_per_image(cfg, traced, stage)
    useful = sum(per_image.values()) - per_image["recomputation"]
    steps = cfg.optim.step_count(per_epoch)
    trained, copies = traced.encoder + traced.ladder, 4 if cfg.optim.ema else 3
    return Plan(
        gpu=gpu.name,
        gpus=gpus,
        zero_stage=stage,
        micro_batch=micro,
        checkpoint=cfg.student.checkpoint,
        accumulation=accumulation,
        placement={row.name: row.placement for row in cfg.teachers},
        optimiser="CPU" if offloaded(settings, "optimizer") else "GPU",
        memory_gb=memory(settings, cfg, traced, gpus, node=gpu.per_node),
        room_gb=gpu.memory_gb,
        tflop_per_image={part: n / 1e12 for part, n in per_image.items()},
        traffic_gb=sum(traffic(settings, traced, gpus, accumulation)) / 1e9,
        seconds=seconds,
        moved_seconds=moved,
        host_seconds=step_time.host(cfg, settings, traced, recomputed(traced, stage)),
        images_per_s=batch / total,
        mfu=batch * useful / total / (gpus * gpu.tflops * 1e12),
        days=steps * total / 86400,
        steps=steps,
        checkpoint_gb=(copies * FP32 * trained + 2 * (trained + traced.frozen)) / 1e9,
        cache_gb_per_view=per_epoch * sum(traced.widths.values()) * (traced.tokens + 1) * 2 / 1e9,
    )
