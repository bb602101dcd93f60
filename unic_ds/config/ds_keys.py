"""Allow-list of a ds_config file's keys: flags, numbers and words of fixed sets.

DeepSpeed's other keys import classes by name, write files, use a network or change the result, so
no file may set them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from unic_ds.config.option import nearest
from unic_ds.files.printable import printable


class Kind(NamedTuple):
    """The values that a key may have: their description and a predicate."""

    description: str
    accepts: Callable[[Any], bool]


def count(most: int = 2**63 - 1) -> Kind:
    """Whole numbers up to `most`; 5e8 is one too, as for DeepSpeed."""
    return Kind(f"a whole number from 0 to {most:,}", lambda v: _integral(v) and 0 <= v <= most)


def words(*known: str | bool | None) -> Kind:
    """One of these."""
    shown = ", ".join("null" if w is None else str(w).lower() for w in known)
    return Kind(shown, lambda v: any(v is w or (isinstance(w, str) and v == w) for w in known))


def _integral(value: object) -> bool:
    """True for a whole number, written with an exponent or not."""
    return type(value) is int or (type(value) is float and value.is_integer())


FLAG = Kind("true or false", lambda v: isinstance(v, bool))
NUMBER = Kind("a number", lambda v: type(v) in (int, float))
PATH = Kind("a path", lambda v: v is None or (isinstance(v, str) and "\0" not in v))
COUNT, BUCKET = count(), count(10**10)
TYPE = words("fp32", "fp16", "bf16", None)

FLAGS = (
    *("allgather_partitions", "allgather_sequential", "compute_grad_norm", "contiguous_gradients"),
    *("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint"),
    *("enable_sanity_checks", "gather_16bit_weights_on_model_save", "ignore_unused_parameters"),
    *("legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings"),
    *("memory_efficient_linear", "override_module_apply", "parameter_alignment"),
    *("pipeline_loading_checkpoint", "reduce_scatter", "round_robin_gradients"),
    *("save_muon_momentum_buffer_in_memory", "stage3_allgather_sequential"),
    *("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
    *("stage3_use_all_reduce_for_fetch_params", "use_all_reduce_for_fetch_params"),
    *("use_multi_rank_bucket_allreduce", "zero_quantized_gradients"),
    *("zero_quantized_nontrainable_weights", "zero_quantized_weights"),
)
COUNTS = (
    *("max_live_parameters", "max_reuse_distance", "model_persistence_threshold"),
    *("module_granularity_threshold", "param_persistence_threshold", "prefetch_bucket_size"),
)
NVME = {
    "device": words("none", "cpu", "nvme"),
    "nvme_path": PATH,
    "buffer_count": count(10_000),
    "pin_memory": FLAG,
}
ZERO = {
    "stage": COUNT,
    "overlap_comm": words(True, False, None),
    "reduce_bucket_size": BUCKET,
    "allgather_bucket_size": BUCKET,
    "sub_group_size": COUNT,
    "zero_hpz_partition_size": COUNT,
    "offload_param": NVME | {"buffer_size": BUCKET, "max_in_cpu": COUNT},
    "offload_optimizer": NVME
    | dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init", "super_offload"), FLAG)
    | {"ratio": NUMBER, "cpuadam_cores_perc": NUMBER},
    **dict.fromkeys(FLAGS, FLAG),
    **dict.fromkeys((*COUNTS, *(f"stage3_{key}" for key in COUNTS)), COUNT),
}
KEYS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": count(1 << 24),
    "zero_optimization": ZERO,
    "bf16": dict.fromkeys(
        (
            *("enabled", "immediate_grad_update", "check_grad_overflow"),
            *("bf16_master_weights_and_grads", "bf16_optimizer_states"),
        ),
        FLAG,
    ),
    "fp16": dict.fromkeys(
        ("enabled", "auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads"), FLAG
    )
    | dict.fromkeys(
        ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"),
        NUMBER,
    ),
    "communication_data_type": TYPE,
    "data_types": {"grad_accum_dtype": TYPE},
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": NUMBER,
    "gradient_allreduce_op": words("mean"),
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
    "disable_allgather": FLAG,
    "dataloader_drop_last": FLAG,
    "steps_per_print": COUNT,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "timers": {"throughput": {"enabled": FLAG, "synchronized": FLAG}},
    "comms_logger": dict.fromkeys(("enabled", "verbose", "prof_all", "debug"), FLAG),
    "flops_profiler": dict.fromkeys(("enabled", "detailed"), FLAG)
    | dict.fromkeys(("profile_step", "module_depth", "top_modules"), NUMBER)
    | {"recompute_fwd_factor": NUMBER, "output_file": words(None)},
    "activation_checkpointing": dict.fromkeys(
        (
            *("partition_activations", "contiguous_memory_optimization", "cpu_checkpointing"),
            *("synchronize_checkpoint_boundary", "profile"),
        ),
        FLAG,
    )
    | {"number_checkpoints": Kind("a whole number", lambda v: v is None or _integral(v))},
    "checkpoint": {
        "tag_validation": words("Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL"),
        "use_node_local_storage": FLAG,
        "load_universal": words(False),
        "parallel_write": {"pipeline_stage": FLAG},
        "writer": words(False),
    },
    "aio": dict.fromkeys(("block_size", "queue_depth"), BUCKET)
    | dict.fromkeys(("intra_op_parallelism", "thread_count"), count(4096))
    | dict.fromkeys(("single_submit", "overlap_events", "use_gds"), FLAG),
    "nebula": words(False),
    "datastates_ckpt": words(False),
}
"""Key -> the kind of its value, or the keys of the object that it holds."""

MONITOR = "the run keeps log.jsonl and tb/ itself"
INSTEAD = {
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), MONITOR),
    "compile": "use --run.compile",
    "torch_autocast": "use bf16, or --precision",
    "amp": "use bf16, or --precision",
    "flops_profiler.output_file": "it would write to a path that the file names",
    "zero_optimization.leaf_module": "it would import classes by name",
}
"""Remedies for keys that people set."""


def check(value: object, known: object = KEYS, at: str = "") -> None:
    """Raise ValueError, one clause, for a key that is not allowed or a value of another kind."""
    if isinstance(known, Kind):
        if not known.accepts(value):
            shown = printable(repr(value), 60)
            why = f" ({INSTEAD[at]})" if at in INSTEAD else ""
            raise ValueError(f"{at!r} must be {known.description}, got {shown}{why}")
        return
    if value is None and at.rpartition(".")[2] in ("offload_param", "offload_optimizer"):
        return
    assert isinstance(known, dict)
    if not isinstance(value, dict):
        raise ValueError(f"{at!r} must be an object, got {printable(repr(value), 60)}")
    for key, inner in value.items():
        name = f"{at}.{key}" if at else key
        if key in known:
            check(inner, known[key], name)
        elif inner != {"enabled": False} and not (key[:1] in "_#/" and isinstance(inner, str)):
            near = nearest(key[:60], list(known))
            remedy = f"; {INSTEAD[name]}" if name in INSTEAD else f"{near}; see docs/ds_configs.md"
            raise ValueError(f"'{printable(name, 60)}' is not allowed{remedy}")
