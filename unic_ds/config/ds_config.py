"""DeepSpeed's settings: a ds_config file, checked and merged with the run's options.

The file decides memory, precision, communication and the micro batch, the run's options decide the
result; a key of the file that an option decides is refused. Stdlib only.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unic_ds.config import Config, ds_keys
from unic_ds.files.documents import read_json
from unic_ds.files.printable import printable

SCIENCE = {
    "train_batch_size": "--optim.batch_size",
    "gradient_accumulation_steps": "--optim.batch_size",
    "gradient_clipping": "--optim.clip",
    "optimizer": "--optim.lr and the other --optim options",
    "scheduler": "--optim.lr and the other --optim options",
    "progressive_layer_drop": "--student.drop_path",
    "data_efficiency": "--data",
    "curriculum_learning": "--data",
}

SIZES = (
    *("reduce_bucket_size", "prefetch_bucket_size"),
    *("max_live_parameters", "max_reuse_distance"),
)
FLAGS = ("reduce_scatter", "use_multi_rank_bucket_allreduce")
"""Keys of zero_optimization that are fields of the same name, without `stage3_`."""

Json = dict[str, Any]
"""A ds_config as JSON."""


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Placement of the optimiser state or of the weights under ZeRO."""

    device: str = "none"  # none: the GPU; else cpu or nvme
    ratio: float = 1.0  # of the optimiser state that is offloaded
    path: str = ""  # for nvme

    @classmethod
    def parse(cls, plain: Json | None) -> Offload:
        """Parse an `offload_*` object of a ds_config."""
        plain = plain or {}
        device = plain.get("device") or "none"
        return cls(device=device, ratio=plain.get("ratio", 1), path=plain.get("nvme_path") or "")

    @property
    def on(self) -> bool:
        """True if anything is offloaded from the GPU."""
        return self.device != "none"


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """Values of a ds_config; the defaults are DeepSpeed's (runtime/zero/config.py)."""

    raw: Json  # the full ds_config, for `deepspeed.initialize` and the run's ds_config.json
    micro_batch: int  # images per rank, at once
    accumulation: int = 1  # micro batches per optimiser step
    stage: int = 0  # of ZeRO
    bf16: bool = False
    communication_dtype: str | None = None  # of gradients while ranks sum them; None: the weights'
    grad_accum_dtype: str | None = None  # of gradients while micro batches are summed
    overlap_comm: bool = False  # reduce gradients during backward; true by default under ZeRO-3
    reduce_bucket_size: int = 500_000_000  # elements, as all sizes here
    reduce_scatter: bool = True
    use_multi_rank_bucket_allreduce: bool = True
    prefetch_bucket_size: int = 50_000_000  # ZeRO-3, as the next two
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    offload_optimizer: Offload = Offload()
    offload_param: Offload = Offload()

    @classmethod
    def parse(cls, raw: Json) -> DeepSpeedSettings:
        """Parse a ds_config, of a file or merged."""
        zero: Json = raw.get("zero_optimization", {})
        zero = {name.removeprefix("stage3_"): value for name, value in zero.items()}
        stage, overlap = zero.get("stage", 0), zero.get("overlap_comm")
        same_name: Json = {name: int(zero[name]) for name in SIZES if name in zero}
        same_name |= {name: zero[name] for name in FLAGS if name in zero}
        return cls(
            raw=raw,
            micro_batch=raw["train_micro_batch_size_per_gpu"],
            accumulation=raw.get("gradient_accumulation_steps", 1),
            stage=stage,
            bf16=bool(raw.get("bf16", {}).get("enabled")),
            communication_dtype=raw.get("communication_data_type"),
            grad_accum_dtype=(raw.get("data_types") or {}).get("grad_accum_dtype"),
            overlap_comm=stage == 3 if overlap is None else overlap,
            offload_optimizer=Offload.parse(zero.get("offload_optimizer")),
            offload_param=Offload.parse(zero.get("offload_param")),
            **same_name,
        )

    def within(self, images: int) -> DeepSpeedSettings:
        """The same images of an optimiser step, in micro batches of at most so many (>= 1)."""
        of_rank = self.micro_batch * self.accumulation
        micro = max(n for n in range(1, min(images, of_rank) + 1) if of_rank % n == 0)
        return replace(self, micro_batch=micro, accumulation=of_rank // micro)


def read(path: str) -> Json:
    """Read a ds_config file; ValueError if it is missing, damaged or refused by `check`."""
    file = Path(path)
    with suppress(OSError):  # `read_json` raises the error
        if not file.exists():
            raise ValueError(
                f"--ds_config {path!r} is no file; ds_configs/ holds zero1.json to"
                " zero3_offload.json"
            )
    try:
        settings = read_json(file)
    except ValueError as error:
        raise ValueError(
            f"--ds_config {path!r} is no JSON file that can be read: {error}"
        ) from None
    if not isinstance(settings, dict):
        raise ValueError(f"--ds_config {path!r} must hold a JSON object")
    check(path, settings)
    return settings


def check(path: str, settings: Json) -> None:
    """Raise ValueError for keys that options decide, that do not work here, or that are unsafe."""
    checks = refuse_science, check_kinds, refuse_unsupported, ds_keys.check, check_nvme
    for each in checks:
        try:
            each(settings)
        except ValueError as error:
            raise ValueError(f"--ds_config {path!r}: {error}") from None


def refuse_science(settings: Json) -> None:
    """Raise ValueError for a key that an option of the run decides."""
    for key in sorted(SCIENCE.keys() & settings.keys()):
        raise ValueError(
            f"it sets {key!r}, which an option of the run decides; remove it and use {SCIENCE[key]}"
        )


def check_kinds(settings: Json) -> None:
    """Raise ValueError if a key that the checks below read has a value of another type."""
    for key in ("fp16", "bf16", "zero_optimization", "data_types", "checkpoint"):
        if not isinstance(settings.get(key, {}), dict):
            raise ValueError(f"{key!r} must be an object, got {shown(settings[key])}")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"the ZeRO stage must be 0 to 3, got {shown(stage)}")


def refuse_unsupported(settings: Json) -> None:
    """Raise ValueError for features of DeepSpeed that do not work with this trainer."""
    zero = settings.get("zero_optimization", {})
    if settings.get("fp16", {}).get("enabled"):
        raise ValueError("it enables fp16; this trainer runs in bf16 or --precision fp32")
    if zero.get("compute_grad_norm") is False:
        raise ValueError(
            "it turns zero_optimization.compute_grad_norm off, which detects non-finite gradients;"
            " remove it"
        )
    saving = settings | settings.get("checkpoint", {})
    for key in ("writer", "nebula", "datastates_ckpt"):
        if saving.get(key, False) is not False:
            raise ValueError(
                f"it enables checkpoints by {key!r}, which return before they are complete"
                " (docs/checkpoints.md); remove it"
            )
    micro = settings.get("train_micro_batch_size_per_gpu")
    if not isinstance(micro, int) or isinstance(micro, bool) or micro < 1:
        raise ValueError(
            f"it needs an integer train_micro_batch_size_per_gpu >= 1, got {shown(micro)}"
        )
    if "grad_accum_dtype" in settings.get("data_types", {}) and zero.get("stage", 0) < 2:
        raise ValueError(
            f"it sets data_types.grad_accum_dtype, which needs ZeRO-2 or 3, not"
            f" {zero.get('stage', 0)}; remove it"
        )


def shown(value: object) -> str:
    """Format a value of a file for a message."""
    return printable(repr(value), 60)


def check_nvme(settings: Json) -> None:
    """Raise ValueError if weights or optimiser state would be offloaded to a folder in use.

    DeepSpeed creates the folder, and removes files there that an earlier run has left.
    """
    parsed = DeepSpeedSettings.parse(settings)
    for key in ("offload_param", "offload_optimizer"):
        offload: Offload = getattr(parsed, key)
        if offload.device != "nvme":
            continue
        folder, path = Path(offload.path), printable(offload.path)
        try:
            names = {file.name for file in folder.iterdir()} if folder.exists() else set()
        except OSError as error:
            raise ValueError(f"{key}.nvme_path {path!r}: {error.strerror}") from None
        if not folder.is_absolute() or names - {"zero_stage_3"}:
            raise ValueError(
                f"{key}.nvme_path must be the absolute path of an empty or new folder, got {path!r}"
            )


def merge(file: Json, cfg: Config, world: int) -> DeepSpeedSettings:
    """Merge a ds_config file with a run's options; ValueError for options that do not fit it.

    The file's micro batch is an upper limit: the largest one that divides the rank's part of the
    batch is used.
    """
    of_rank, rest = divmod(cfg.optim.batch_size, world)
    if rest or not of_rank:
        raise ValueError(
            f"optim.batch_size {cfg.optim.batch_size} is not a multiple of {world} ranks; change it"
            " or the number of ranks"
        )
    settings = DeepSpeedSettings.parse(file)
    if settings.stage == 3 and cfg.run.compiles("student"):
        raise ValueError(
            f"run.compile {cfg.run.compile!r} does not go with ZeRO-3: a compiled block would keep"
            " its gathered weights until backward; use teachers or none, or ZeRO-1 or 2"
        )
    if settings.stage == 3 and cfg.balance.compares_gradients:
        raise ValueError(
            f"balance.kind {cfg.balance.kind!r} does not go with ZeRO-3, which gathers the ladder's"
            " weights for one backward, not for one of each teacher; use ZeRO-1 or 2, or"
            " --balance.kind famo"
        )
    limit = min(settings.micro_batch, of_rank)
    micro = next(n for n in range(limit, 0, -1) if of_rank % n == 0)
    merged = file | {
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": cfg.optim.batch_size,
        "gradient_accumulation_steps": of_rank // micro,
        "gradient_clipping": cfg.optim.clip,
    }
    # DeepSpeed's throughput timer waits for the GPU twice a micro batch.
    merged.setdefault("timers", {"throughput": {"enabled": False}})
    if cfg.optim.ema:
        check_ema(settings.offload_optimizer)
        merged["zero_allow_untested_optimizer"] = True  # DeepSpeed refuses subclasses of AdamW
    if cfg.precision:
        merged["bf16"] = file.get("bf16", {}) | {"enabled": cfg.precision == "bf16"}
        if cfg.precision == "fp32":
            merged.pop("communication_data_type", None)
            merged.pop("data_types", None)
    return DeepSpeedSettings.parse(merged)


def check_ema(offload: Offload) -> None:
    """Raise ValueError if the optimiser state is on NVMe or offloaded in part: EMA updates all."""
    if offload.device == "nvme" or offload.ratio != 1:
        raise ValueError(
            "optim.ema needs the full optimiser state on the GPU or the CPU, but the ds_config has"
            f" offload_optimizer.device {offload.device!r} and ratio {offload.ratio}; set its"
            " device to cpu, or optim.ema to 0"
        )
