"""The ds_config of small runs."""

from typing import Any


def ds_settings(micro: int, zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Settings of DeepSpeed: images a rank takes at a time, `zero_optimization`, and others."""
    return {
        "train_micro_batch_size_per_gpu": micro,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    } | more
