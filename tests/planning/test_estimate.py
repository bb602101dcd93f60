"""The planner's memory and FLOPs are those of real runs; its table says what fits."""

from __future__ import annotations

import json

import pytest
from runs import DEMONSTRATION, ROOT, SUPPORT, launch, run

from unic_ds import demo
from unic_ds.config import ds_config, overrides, recipes
from unic_ds.planning import estimate
from unic_ds.planning.trace import RECOMPUTED, RECOMPUTED_ZERO3, trace

pytestmark = [DEMONSTRATION, pytest.mark.slow, pytest.mark.lengthy, pytest.mark.dist]

SIZE = {"student.size": "64", "precision": ""}
PATCHES = SIZE | {"teachers.effnet.size": "64", "teachers.dinov2.size": "56"}
PATCHES |= {f"teachers.{name}.precision": "bf16" for name in ("effnet", "dinov2")}
RECOMPUTE, EMA = "student.activation_checkpointing", {"optim.ema": "0.99"}
CONFIGS = [
    *((PATCHES, stage, True, 2) for stage in (1, 2, 3)),
    *((PATCHES, stage, False, 4) for stage in (0, 2)),
    (PATCHES | EMA | {RECOMPUTE: "full"}, 2, True, 4),
    (PATCHES | EMA | {RECOMPUTE: "every:3"}, 3, True, 4),
    (
        PATCHES
        | {"ladder.activation_checkpointing": "all", "student.model": "vit_small_patch16_224"},
        2,
        True,
        4,
    ),
    (PATCHES | {"ladder.projector": "linear", "ladder.rungs": "last"}, 2, False, 8),
    (PATCHES | {"kernels": "reference"}, 3, True, 2),
]
if demo.precision() == "fp32":  # a CPU that takes ten times as long for bf16: of each kind one
    CONFIGS = CONFIGS[::2]


def settings(stage, bf16, micro):
    """A ds_config file's contents; small buckets, which are not what is compared."""
    file = json.loads((ROOT / "ds_configs" / f"zero{max(stage, 1)}.json").read_text())
    file["zero_optimization"]["stage"] = stage
    # ZeRO-3 holds its bucket all the time; the others keep a gradient larger than theirs
    file["zero_optimization"]["reduce_bucket_size"] = 1000 if stage == 3 else 3_000_000
    # some free what they gather at once, others keep all of it from forward to backward
    file["zero_optimization"]["stage3_prefetch_bucket_size"] = 0 if bf16 else 1_000_000
    file["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file["zero_optimization"]["stage3_max_reuse_distance"] = 0
    # a gradient is summed on all ranks, or on those that keep its parts
    file["zero_optimization"]["use_multi_rank_bucket_allreduce"] = bf16
    return file | {"train_micro_batch_size_per_gpu": micro, "bf16": {"enabled": bf16}}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Figures of two real ranks for every configuration."""
    file = tmp_path_factory.mktemp("held") / "plan.json"
    rows = [
        (options | {"optim.batch_size": str(4 * micro)}, settings(stage, bf16, micro))
        for options, stage, bf16, micro in CONFIGS
    ]
    file.write_text(json.dumps(rows))
    run(launch(SUPPORT / "held_memory.py", file), timeout=900)  # minutes, on a busy machine
    return json.loads(file.with_suffix(".measured").read_text())


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_memory_and_flops_are_those_of_a_real_run(measured, number):
    options, stage, bf16, micro = CONFIGS[number]
    options = options | {"optim.batch_size": str(4 * micro)}
    cfg = overrides.override_all(recipes.get("quickstart"), options)
    merged = ds_config.merge(settings(stage, bf16, micro), cfg, 2)
    traced = trace(cfg, micro, bf16=bf16)
    held = estimate.kinds(merged, traced, 2, ema=bool(cfg.optim.ema))
    real = measured[number]
    between, gradients, kept = real["between"], real["gradients"], real["kept"]
    if stage == 3:  # the gradients' places are made at the start
        between, gradients = between - held["gradients"], held["gradients"]
    assert between == pytest.approx(held["weights"] + held["optimiser"], rel=0.1)
    assert kept == pytest.approx(sum(traced.kept.values()), rel=0.1)
    if stage == 1:  # whose buckets are there by now
        gradients -= estimate.reduce_buckets(merged)
    if stage != 2:  # which keeps all of a gradient that lies on the border of two ranks
        assert gradients == pytest.approx(held["gradients"], rel=0.1)
    predicted = sum(held.values()) + sum(traced.kept.values())
    assert between + gradients + kept == pytest.approx(predicted, rel=0.1)
    forward = traced.flops["encoder forward"] + traced.flops["ladder forward"]
    assert real["forward_flops"] == pytest.approx(forward, rel=0.02)
    step = forward + traced.flops["backward"]
    if stage == 3:
        step += traced.flops[RECOMPUTED_ZERO3] - traced.flops[RECOMPUTED]
    assert real["step_flops"] == pytest.approx(step, rel=0.02)
    sent = estimate.traffic(merged, traced, 2, merged.accumulation)
    # recomputed blocks gather a few weights a third time
    assert real["sent"] == pytest.approx(sum(sent), rel=0.05)
    # what is measured after the last step has the room that training had
    assert real["left"] < 0.01 * between
