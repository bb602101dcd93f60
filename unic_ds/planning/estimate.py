"""Estimates memory, communication and time of a run from a traced step, before it is queued.

Memory per GPU under ZeRO stage s of W ranks, P trained and F frozen weights of the student, b bytes
a weight (2 in bf16, 4 in fp32), as DeepSpeed holds it (test_estimate.py measures it):

    weights     (P + F) b,  of W under s = 3
    masters     4 P,        of W under s >= 1; in fp32 under s = 0 the weights themselves
    moments     8 P (12 P with an average), of W under s >= 1
    gradients   b P,        of W under s >= 2

Time is that of the kernels (`step_time`), plus communication that backward does not hide; or that
of the host, if Python takes longer to launch the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from unic_ds import config
from unic_ds.config.ds_config import DeepSpeedSettings
from unic_ds.planning import step_time
from unic_ds.planning.gpus import Efficiency, Gpu
from unic_ds.planning.trace import Trace

CONTEXT_GB = 2.0  # CUDA, NCCL and cuBLAS work spaces
CACHE = 0.04  # fragmentation of the caching allocator, as a fraction of live memory
FP32 = 4  # bytes
CPU_GB_S = 200  # memory bandwidth of a node's CPUs, which its ranks share; assumed
UPDATE = 34  # bytes that AdamW reads and writes per weight
BUSY = ("teachers", "encoder", "ladder", "recomputation")
HIDDEN_HOST = "host not hidden"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimated memory and speed of a run; memory and bytes are of one GPU."""

    gpu: str
    gpus: int
    zero_stage: int
    micro_batch: int
    splits: dict[int, tuple[int, int]]  # side of the student's images -> micro batch, accumulation
    checkpoint: str  # student.activation_checkpointing
    accumulation: int
    placement: dict[str, str]  # of each teacher's weights
    optimiser: str  # GPU or CPU
    memory_gb: dict[str, float]  # by kind
    room_gb: float  # memory of the GPU
    tflop_per_image: dict[str, float]
    traffic_gb: float  # that a GPU sends in an optimiser step
    seconds: dict[str, float]  # of an optimiser step, by part
    moved_seconds: dict[str, float]  # part of them: memory-bound kernels
    host_seconds: dict[str, float]  # Python's, to launch the kernels of an optimiser step
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
        """True if the run fits into the GPU's memory."""
        return self.needs_gb <= self.room_gb

    @property
    def bound(self) -> str:
        """The bottleneck of a step, host or GPU."""
        return "host" if self.seconds[HIDDEN_HOST] else "GPU"


def kinds(settings: DeepSpeedSettings, traced: Trace, world: int, *, ema: bool) -> dict[str, float]:
    """Bytes per rank of weights, gradients and optimiser state between steps (see above)."""
    stage = settings.stage
    bf16, b = settings.bf16, weight_bytes(settings)
    trained, frozen = traced.encoder + traced.ladder, traced.frozen
    masters = FP32 * trained if bf16 or stage else 0
    accumulated = FP32 if settings.grad_accum_dtype == "fp32" else b
    moments = (3 if ema else 2) * FP32 * trained
    return {
        "weights": (trained + frozen) * b / (world if stage == 3 else 1),
        "gradients": trained * accumulated / (world if stage >= 2 else 1),
        "optimiser": (masters + moments) / (world if stage else 1),
    }


def weight_bytes(settings: DeepSpeedSettings) -> int:
    """Bytes per weight in the student's forward and backward."""
    return 2 if settings.bf16 else FP32


def buffers(settings: DeepSpeedSettings, traced: Trace) -> float:
    """Bytes of DeepSpeed's buckets, and of weights that ZeRO-3 has gathered."""
    b, trained = weight_bytes(settings), traced.encoder + traced.ladder
    if settings.stage == 0:
        return 0.0
    if settings.stage < 3:  # weights are gathered in place; a bucket is flattened, cast and summed
        bucket, cast = min(settings.reduce_bucket_size, trained), summed_bytes(settings)
        return reduce_buckets(settings) + bucket * (b + (cast if cast != b else 0))
    gathered = min(settings.max_live_parameters, trained)
    return settings.reduce_bucket_size * FP32 + gathered * b


def keeps_gathered(settings: DeepSpeedSettings, traced: Trace) -> bool:
    """True if ZeRO-3 gathers weights once per micro batch and keeps them for backward.

    Prefetching gathers up to `max_live_parameters` ahead and keeps what it gathers; without it, a
    weight is kept that is used again within `max_reuse_distance`. Forward and backward together
    use each weight twice.
    """
    trained = traced.encoder + traced.ladder
    if settings.prefetch_bucket_size:
        return trained <= settings.max_live_parameters
    return 2 * trained <= settings.max_reuse_distance


def reduce_buckets(settings: DeepSpeedSettings) -> float:
    """Bytes of the buckets in which ZeRO-1 and 2 reduce gradients: two if they overlap."""
    buckets = 2 if settings.overlap_comm else 1
    return settings.reduce_bucket_size * weight_bytes(settings) * buckets


def summed_bytes(settings: DeepSpeedSettings) -> int:
    """Bytes per gradient while ranks sum it."""
    return FP32 if settings.communication_dtype == "fp32" else weight_bytes(settings)


def memory(
    settings: DeepSpeedSettings, cfg: config.Config, traced: Trace, world: int, *, node: int
) -> dict[str, float]:
    """Peak GB of a rank by kind; a node has `node` GPUs."""
    held = kinds(settings, traced, world, ema=bool(cfg.optim.ema))
    if settings.offload_optimizer.on:
        held["optimiser"] = 0.0
        if settings.stage > 1:  # ZeRO-1 keeps them on the GPU until the step
            held["gradients"] = 0.0
    if settings.offload_param.on:
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


def teachers(cfg: config.Config, traced: Trace, node: int) -> float:
    """Bytes of the teachers' weights on one of a node's `node` GPUs."""
    share = {"replicate": 1.0, "shard": 1 / node, "offload": 0.0}
    return sum(traced.teachers[row.name][1] * share[row.placement] for row in cfg.teachers)


def flops_per_image(cfg: config.Config, traced: Trace, stage: int) -> dict[str, float]:
    """FLOPs per image by part; the ladder's fused backward skips dropped (teacher, image) pairs."""
    per = {name: value / traced.images for name, value in traced.flops.items()}
    teachers = sum(value for name, value in per.items() if name.startswith("teacher "))
    forward, ladder = per["encoder forward"], per["ladder forward"]
    skipping = traced.work["ladder forward"].ladder / traced.images  # of kernels that skip pairs
    again = 3 * step_time.RECOMPUTE_ALL if cfg.ladder.activation_checkpointing == "all" else 0.0
    passes = 1 + 2 * step_time.ladder_backwards(cfg)
    return {
        "teachers": teachers,
        "encoder": 3 * forward,
        "ladder": passes * ladder - 2 * skipping * (1 - cfg.kept_share),
        "recomputation": recomputed(traced, stage) / traced.images + again * skipping,
    }


def recomputed(traced: Trace, stage: int) -> float:
    """FLOPs of the encoder's blocks that backward recomputes."""
    return traced.flops["recomputed under ZeRO-3" if stage == 3 else "recomputed"]


def traffic(
    settings: DeepSpeedSettings, traced: Trace, world: int, accumulation: int
) -> tuple[float, float]:
    """Bytes that a rank sends in an optimiser step, by rings: (of gradients, of weights).

    ZeRO-1 and 2 all-reduce a bucket, which sends twice the bytes of a reduce-scatter, unless the
    ds_config turns `use_multi_rank_bucket_allreduce` off.
    """
    stage = settings.stage
    part = (world - 1) / world * (traced.encoder + traced.ladder)
    gradients, weights = part * summed_bytes(settings), part * weight_bytes(settings)
    if stage == 3:
        gathers = 1 if keeps_gathered(settings, traced) else 2
        return accumulation * gradients, accumulation * gathers * weights
    if not (stage and settings.reduce_scatter) or settings.use_multi_rank_bucket_allreduce:
        gradients *= 2
    return gradients * (accumulation if stage == 2 else 1), weights if stage else 0.0


def exposed(
    settings: DeepSpeedSettings,
    gradients: float,
    weights: float,
    backward: float,
    overlap: float,
    last: float,
) -> float:
    """Seconds of communication that backward does not hide, of `gradients` and `weights` seconds.

    Backward overlaps with the reduction of gradients, except for the `last` bucket's fraction,
    which is full only at its end, and under ZeRO-3 with gathering weights. ZeRO-1 and 2 gather
    weights after the step, without overlap. ZeRO-1 reduces gradients in the last backward only.
    """
    stage = settings.stage
    during, after = (gradients + weights, 0.0) if stage == 3 else (gradients, weights)
    if stage < 2:
        backward /= settings.accumulation
    if stage and settings.overlap_comm:
        during = max(last * gradients, during - overlap * backward)
    return during + after


def last_bucket(settings: DeepSpeedSettings, traced: Trace) -> float:
    """Fraction of the gradients in the bucket that backward fills last."""
    trained = traced.encoder + traced.ladder
    size = settings.reduce_bucket_size
    return (trained % size or size) / trained if size < trained else 1.0


def gathering(cfg: config.Config, traced: Trace, gpu: Gpu, gpus: int, rate: Efficiency) -> float:
    """Seconds per micro batch to gather sharded or offloaded teachers, without overlap."""
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
    settings: DeepSpeedSettings, traced: Trace, gpu: Gpu, gpus: int, rate: Efficiency
) -> tuple[float, float]:
    """(seconds on PCIe, seconds of AdamW on CPUs) of an optimiser step under ZeRO offload.

    Gradients are copied to the CPU and weights back once per step; offloaded weights are copied to
    the GPU for each forward and each backward.
    """
    trained = traced.encoder + traced.ladder
    share = trained / (gpus if settings.stage else 1)
    b, pcie, adam = weight_bytes(settings), 0.0, 0.0
    if settings.offload_optimizer.on:
        pcie += (FP32 + b) * share
        adam = UPDATE * share * min(gpus, gpu.per_node) / (CPU_GB_S * 1e9)
    if settings.offload_param.on:
        pcie += 2 * settings.accumulation * b * share
    return pcie / (gpu.host_gb_s * 1e9 * rate.links), adam


def speed(gpu: Gpu, gpus: int, rate: Efficiency) -> float:
    """Bytes per second that a rank sends in a ring over all ranks."""
    link = gpu.node_gb_s
    if gpus > gpu.per_node:  # a ring crosses nodes through all of a node's adapters
        link = min(link, gpu.net_gb_s * gpu.per_node)
    return link * 1e9 * rate.links


def step_seconds(
    cfg: config.Config,
    settings: DeepSpeedSettings,
    traced: Trace,
    gpu: Gpu,
    gpus: int,
    rate: Efficiency,
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of an optimiser step by part, and those of its memory-bound kernels."""
    accumulation, stage = settings.accumulation, settings.stage
    kernels = step_time.kernels(cfg, traced, gpu, rate, recomputed(traced, stage))
    all_of: dict[str, float] = dict.fromkeys(BUSY, 0.0)
    moved = dict(all_of)
    for name, kernel in kernels.items():
        part = name.partition(" ")[0]
        all_of[part] += accumulation * kernel.all
        moved[part] += accumulation * kernel.moved
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
    settings: DeepSpeedSettings,
    traced: Trace,
    gpu: Gpu,
    gpus: int,
    *,
    per_epoch: int,
    efficiency: Efficiency | None = None,
) -> Plan:
    """The plan of a run on `gpus` GPUs; `settings` are merged, `traced` is of their micro batch."""
    micro = settings.micro_batch
    accumulation, stage = settings.accumulation, settings.stage
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
        splits={cfg.student.size: (micro, accumulation)},
        checkpoint=cfg.student.activation_checkpointing,
        accumulation=accumulation,
        placement={row.name: row.placement for row in cfg.teachers},
        optimiser="CPU" if settings.offload_optimizer.on else "GPU",
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
        cache_gb_per_view=cache_gb(traced, per_epoch=per_epoch),
    )


def cache_gb(traced: Trace, *, per_epoch: int) -> float:
    """GB of the teachers' features of one view of all images, in bf16."""
    return per_epoch * traced.features * 2 / 1e9
