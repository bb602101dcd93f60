"""Memory, communication and time of a run before it is queued: arithmetic on a traced step.

Memory per GPU under ZeRO stage s of W ranks, P trained and F frozen weights of the student, b bytes
a weight (2 in bf16, 4 in fp32), as DeepSpeed holds it (tests/test_plan.py measures it):

    weights     (P + F) b,  of W under s = 3
    masters     4 P,        of W under s >= 1; in fp32 under s = 0 the weights themselves
    moments     8 P (12 P with an average), of W under s >= 1
    gradients   b P,        of W under s >= 2

Time is FLOPs over peak times efficiency, plus the communication that backward does not hide.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from unic_ds import config, ds_config
from unic_ds.gpus import Gpu

if TYPE_CHECKING:  # for it knows torch, and a wrong option is told before
    from unic_ds.tracing import Trace

CONTEXT_GB = 2.0  # CUDA, NCCL and cuBLAS work spaces
CACHE = 0.04  # what the caching allocator cannot use, of what is live
FP32 = 4  # bytes
CPU_GB_S = 200  # memory bandwidth of a node's CPUs, which its ranks share; assumed
RECOMPUTE_ALL = 0.16  # of the ladder's work, as kernels/README.md counts it
UPDATE = 34  # bytes that AdamW reads and writes for a weight
HALF = 1000  # patch tokens of a micro batch at which GEMMs reach half their efficiency; assumed


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peaks that parts reach with large micro batches.

    Assumptions, to be replaced by measured ones.
    """

    teachers: float = 0.50
    student: float = 0.45
    ladder: float = 0.50
    links: float = 0.75
    overlap: float = 0.80  # of what communication may hide behind: backward, teachers' forward

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            config.check(0 < value <= 1, f"--efficiency {name}", "in (0, 1]", value)


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
        """Whether it fits."""
        return self.needs_gb <= self.room_gb


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
    if stage < 3:
        gathered = min(zero.get("allgather_bucket_size", 5e8), trained) * b
        return reduce_buckets(settings, traced) + gathered
    live = min(zero.get("stage3_max_live_parameters", 1e9), trained)
    ahead = min(zero.get("stage3_prefetch_bucket_size", 5e7), trained)
    return zero.get("reduce_bucket_size", 5e8) * FP32 + (live + ahead) * b


def reduce_buckets(settings: dict[str, Any], traced: Trace) -> float:
    """Bytes of the buckets in which ZeRO-1 and 2 reduce gradients: two where they overlap."""
    zero = settings["zero_optimization"]
    weights = min(zero.get("reduce_bucket_size", 5e8), traced.encoder + traced.ladder)
    return weights * weight_bytes(settings) * (2 if zero.get("overlap_comm") else 1)


def memory(
    settings: dict[str, Any], cfg: config.Config, traced: Trace, world: int, *, node: int
) -> dict[str, float]:
    """GB of a rank by kind, at its fullest moment; a node has `node` GPUs."""
    held = kinds(settings, traced, world, ema=bool(cfg.optim.ema))
    if offloaded(settings, "optimizer"):
        held["optimiser"] = held["gradients"] = 0.0
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
    """FLOPs of an image's step by part; the ladder's backward skips what teacher dropping drops.

    Recomputation is what backward does of the forward again.
    """
    per = {name: value / traced.images for name, value in traced.flops.items()}
    teachers = sum(value for name, value in per.items() if name.startswith("teacher "))
    forward, ladder = per["encoder forward"], per["ladder forward"]
    count = len(cfg.teachers)
    kept = (1 + (count - 1) * (1 - cfg.drop.rate)) / count
    again = 3 * RECOMPUTE_ALL if cfg.ladder.recompute == "all" else 0.0
    return {
        "teachers": teachers,
        "encoder": 3 * forward,
        "ladder": ladder * (1 + 2 * kept),
        "recomputation": per["recomputed under ZeRO-3" if stage == 3 else "recomputed"]
        + again * ladder,
    }


def traffic(settings: dict[str, Any], traced: Trace, world: int, accumulation: int) -> float:
    """Bytes that a rank sends in an optimiser step, by rings."""
    stage = ds_config.stage(settings)
    b = weight_bytes(settings)
    grad = FP32 if settings.get("communication_data_type") == "fp32" else b
    trained, share = traced.encoder + traced.ladder, (world - 1) / world
    if stage == 0:
        return 2 * share * trained * grad
    if stage == 1:
        return share * trained * (grad + b)
    if stage == 2:
        return share * trained * (accumulation * grad + b)
    return share * trained * accumulation * (grad + 2 * b)


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
    rate = efficiency or Efficiency()
    micro = settings["train_micro_batch_size_per_gpu"]
    accumulation = settings["gradient_accumulation_steps"]
    assert traced.images == micro
    per_image = flops_per_image(cfg, traced, ds_config.stage(settings))
    images = micro * accumulation
    full = micro * traced.tokens / (micro * traced.tokens + HALF)
    at = {"teachers": rate.teachers, "ladder": rate.ladder}
    peak = gpu.tflops * 1e12 * full
    busy = {part: images * n / (peak * at.get(part, rate.student)) for part, n in per_image.items()}
    backward = 2 / 3 * (busy["encoder"] + busy["ladder"])
    sent = traffic(settings, traced, gpus, accumulation)
    link = gpu.node_gb_s
    if gpus > gpu.per_node:  # a ring crosses nodes through all of a node's adapters
        link = min(link, gpu.net_gb_s * gpu.per_node)
    wire = sent / (link * 1e9 * rate.links) if gpus > 1 else 0.0
    overlaps = settings.get("zero_optimization", {}).get("overlap_comm", False)
    seen = max(0.0, wire - rate.overlap * backward) if overlaps else wire
    trained = traced.encoder + traced.ladder
    whole = ds_config.stage(settings) == 0
    update = UPDATE * trained / (1 if whole else gpus) / (gpu.memory_gb_s * 1e9)
    gathers = accumulation * gathering(cfg, traced, gpu, gpus, rate)
    pcie, adam = crossing(settings, traced, gpu, gpus, rate)
    seconds = busy | {
        "communication not hidden": seen,
        "teachers' weights not hidden": max(0.0, gathers - rate.overlap * busy["teachers"]),
        "PCIe": pcie,
        "update": adam or update,
    }
    total = sum(seconds.values())
    batch = images * gpus
    steps = cfg.optim.step_count(per_epoch)
    useful = sum(per_image.values()) - per_image["recomputation"]
    copies = 4 if cfg.optim.ema else 3
    return Plan(
        gpu=gpu.name,
        gpus=gpus,
        zero_stage=ds_config.stage(settings),
        micro_batch=micro,
        checkpoint=cfg.student.checkpoint,
        accumulation=accumulation,
        placement={row.name: row.placement for row in cfg.teachers},
        optimiser="CPU" if offloaded(settings, "optimizer") else "GPU",
        memory_gb=memory(settings, cfg, traced, gpus, node=gpu.per_node),
        room_gb=gpu.memory_gb,
        tflop_per_image={part: n / 1e12 for part, n in per_image.items()},
        traffic_gb=sent / 1e9,
        seconds=seconds,
        images_per_s=batch / total,
        mfu=batch * useful / total / (gpus * gpu.tflops * 1e12),
        days=steps * total / 86400,
        steps=steps,
        checkpoint_gb=(copies * FP32 * trained + 2 * (trained + traced.frozen)) / 1e9,
        cache_gb_per_view=per_epoch * sum(traced.widths.values()) * (traced.tokens + 1) * 2 / 1e9,
    )
