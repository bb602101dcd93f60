"""A ds_config file, checked and joined with what the run config owns.

The file owns memory, precision, communication and the micro batch; the run config owns the science.
A key that would speak twice is refused. Stdlib only, so that a mistake is told before anything
heavy is imported.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from unic_ds.config import Config, ds_keys
from unic_ds.files.documents import read_json
from unic_ds.files.printable import printable

SCIENCE = {
    "train_batch_size": "--optim.batch_size",
    "gradient_accumulation_steps": "--optim.batch_size",
    "gradient_clipping": "--optim.clip",
    "optimizer": "--optim.lr and its neighbours",
    "scheduler": "--optim.lr and its neighbours",
    "progressive_layer_drop": "--student.drop_path",
    "data_efficiency": "--data",
    "curriculum_learning": "--data",
}


def read(path: str) -> dict[str, Any]:
    """The settings of a ds_config file; ValueError where it is missing, damaged or sets science."""
    file = Path(path)
    with suppress(OSError):  # `read_json` says what is wrong
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


def check(path: str, settings: dict[str, Any]) -> None:
    """ValueError where a file sets science, what this trainer cannot do, or what could do harm."""
    checks = refuse_science, check_kinds, refuse_what_cannot_run, ds_keys.check, check_nvme
    for holds in checks:
        try:
            holds(settings)
        except ValueError as error:
            raise ValueError(f"--ds_config {path!r}: {error}") from None


def refuse_science(settings: dict[str, Any]) -> None:
    """ValueError for a key that the run config owns."""
    for key in sorted(SCIENCE.keys() & settings.keys()):
        raise ValueError(f"it sets {key!r}, which the run owns; remove it and use {SCIENCE[key]}")


def check_kinds(settings: dict[str, Any]) -> None:
    """ValueError where the keys that are looked at below are of another kind."""
    for key in ("fp16", "bf16", "zero_optimization", "data_types", "checkpoint"):
        if not isinstance(settings.get(key, {}), dict):
            raise ValueError(f"{key!r} must be an object, got {shown(settings[key])}")
    if stage(settings) not in (0, 1, 2, 3):
        raise ValueError(f"the ZeRO stage must be 0 to 3, got {shown(stage(settings))}")


def refuse_what_cannot_run(settings: dict[str, Any]) -> None:
    """ValueError for what DeepSpeed has and this trainer cannot do."""
    if settings.get("fp16", {}).get("enabled"):
        raise ValueError("it asks for fp16; this trainer runs in bf16 or --precision fp32")
    if settings.get("zero_optimization", {}).get("compute_grad_norm") is False:
        raise ValueError(
            "it turns zero_optimization.compute_grad_norm off, by which steps that are not finite"
            " are known; remove it"
        )
    saving = settings | settings.get("checkpoint", {})
    for key in ("writer", "nebula", "datastates_ckpt"):
        if saving.get(key, False) is not False:
            raise ValueError(
                f"it asks for checkpoints by {key!r}, which return before they are whole"
                " (docs/checkpoints.md); remove it"
            )
    micro = settings.get("train_micro_batch_size_per_gpu")
    if not isinstance(micro, int) or isinstance(micro, bool) or micro < 1:
        raise ValueError(
            f"it needs a whole train_micro_batch_size_per_gpu >= 1, got {shown(micro)}"
        )
    if "grad_accum_dtype" in settings.get("data_types", {}) and stage(settings) < 2:
        raise ValueError(
            f"it sets data_types.grad_accum_dtype, which goes with ZeRO-2 and 3, not"
            f" {stage(settings)}; remove it"
        )


def shown(value: object) -> str:
    """A value of a file as a message shows it."""
    return printable(repr(value), 60)


def check_nvme(settings: dict[str, Any]) -> None:
    """ValueError where weights or optimiser state would be swapped into a folder with other files.

    DeepSpeed makes the folder, and removes there what an earlier run has left.
    """
    for key in ("offload_param", "offload_optimizer"):
        offload = settings.get("zero_optimization", {}).get(key) or {}
        if offload.get("device") != "nvme":
            continue
        given = offload.get("nvme_path") or ""
        try:
            there = {file.name for file in Path(given).iterdir()} if Path(given).exists() else set()
        except OSError as error:
            raise ValueError(f"{key}.nvme_path {printable(given)!r}: {error.strerror}") from None
        if not Path(given).is_absolute() or there - {"zero_stage_3"}:
            raise ValueError(
                f"{key}.nvme_path must be the whole path of a folder of its own, empty or new,"
                f" got {printable(given)!r}"
            )


def merge(settings: dict[str, Any], cfg: Config, world: int) -> dict[str, Any]:
    """The file's settings and the run's; ValueError where the batch does not divide by the ranks.

    The file's micro batch is the most that fits: the largest that divides a rank's share is taken.
    """
    share, odd = divmod(cfg.optim.batch_size, world)
    if odd or not share:
        raise ValueError(
            f"optim.batch_size {cfg.optim.batch_size} is not a multiple of {world} ranks; change it"
            " or the number of ranks"
        )
    if stage(settings) == 3 and cfg.run.compiles("student"):
        raise ValueError(
            f"run.compile {cfg.run.compile!r} does not go with ZeRO-3: a compiled block would keep"
            " its gathered weights until backward; use teachers or none, or ZeRO-1 or 2"
        )
    most = settings["train_micro_batch_size_per_gpu"]
    micro = next(n for n in range(min(most, share), 0, -1) if share % n == 0)
    merged = settings | {
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": cfg.optim.batch_size,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": cfg.optim.clip,
    }
    # DeepSpeed's throughput timer waits for the GPU twice a micro batch.
    merged.setdefault("timers", {"throughput": {"enabled": False}})
    if cfg.optim.ema:
        refuse_what_averages_cannot(settings)
        merged["zero_allow_untested_optimizer"] = True  # DeepSpeed knows AdamW by its exact type
    if cfg.precision:
        merged["bf16"] = settings.get("bf16", {}) | {"enabled": cfg.precision == "bf16"}
        if cfg.precision == "fp32":
            merged.pop("communication_data_type", None)
            merged.pop("data_types", None)
    return merged


def refuse_what_averages_cannot(settings: dict[str, Any]) -> None:
    """ValueError where the optimiser's state would not all be in reach: on NVMe, or in parts."""
    offload = settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device") == "nvme" or offload.get("ratio", 1) != 1:
        raise ValueError(
            "optim.ema wants the optimiser's state whole on the GPU or the CPU, but the ds_config"
            f" has offload_optimizer {offload!r}; set its device to cpu, or optim.ema to 0"
        )


def stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage that the settings ask for."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def bf16(settings: dict[str, Any]) -> bool:
    """Whether the student trains in bf16."""
    return bool(settings.get("bf16", {}).get("enabled"))
