"""The host waits for the device nowhere in a step, and streams wait for each other where needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from forked import Forked
from runs import ROOT, SUPPORT, launch, run, together

from unic_ds import config
from unic_ds.config import ds_config
from unic_ds.engine import deepspeed_engine

BUCKETS = ("zero1", 1, {}), ("zero2", 2, {})
PARTITIONED = ("zero3", 2, {"stage3_param_persistence_threshold": 100})
NONE_PERSISTENT = ("zero3", 2, {"stage3_param_persistence_threshold": 0})
PLAN = [
    (stage, micro, zero, waits)
    for stage, micro, zero in (*BUCKETS, PARTITIONED, NONE_PERSISTENT)
    for waits in ("deepspeed", "ours", "none")
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Measurements of two ranks for each row of the plan, on a device with streams."""
    file = tmp_path_factory.mktemp("waits") / "plan.json"
    rows = [(str(ROOT / "ds_configs" / f"{stage}.json"), *rest) for stage, *rest in PLAN]
    file.write_text(json.dumps(rows))
    run(together(file, 2, "ordered_steps.py"))
    return json.loads(file.with_suffix(".measured").read_text())


def of(measured: list[dict[str, Any]], waits: str) -> dict[str, dict[str, Any]]:
    """Rows with such waits, by stage and threshold."""
    return {str(row[:3]): told for row, told in zip(PLAN, measured, strict=True) if row[3] == waits}


def test_the_host_waits_for_the_device_nowhere_in_a_step(measured: list[dict[str, Any]]) -> None:
    for row, told in of(measured, "ours").items():
        assert told["host_waits"] == {}, row


def test_no_operator_races_with_one_of_another_stream(measured: list[dict[str, Any]]) -> None:
    for row, told in of(measured, "ours").items():
        assert told["races"] == {}, row


def test_losses_are_those_with_deepspeeds_own_waits(measured: list[dict[str, Any]]) -> None:
    own = of(measured, "deepspeed")
    for row, told in of(measured, "ours").items():
        assert told["losses"] == own[row]["losses"], row


def test_deepspeed_itself_waits_for_the_device(measured: list[dict[str, Any]]) -> None:
    """Else its next version has made ours needless: in three steps of one or two micro batches."""
    own = of(measured, "deepspeed")
    assert [told["host_waits"] for told in own.values()] == [
        {"device": 3},
        {"device": 6},
        {"stream": 6, "device": 3},
        {"stream": 6},
    ]


def test_races_are_found_where_nothing_waits(measured: list[dict[str, Any]]) -> None:
    """And where DeepSpeed gathers weights that AdamW may still write: none is persistent."""
    for row, told in of(measured, "none").items():
        assert told["races"]["the default stream does not come after the reductions"] > 0, row
        assert any(race.startswith("aten._to_copy") for race in told["races"]), row
    own = [told["races"] for told in of(measured, "deepspeed").values()]
    assert own[:3] == [{}, {}, {}]
    assert set(own[3]) == {"aten.cat.out after aten.copy_.default"}


@pytest.mark.parametrize("norm", [2.5, 0.0, float("inf"), float("-inf"), float("nan")])
def test_a_norm_is_marked_as_deepspeed_marks_it(norm: float) -> None:
    from deepspeed.runtime import utils
    from deepspeed.runtime.zero import stage_1_and_2

    deepspeed_engine.mask_norm_on_device()
    own, ours = torch.tensor(norm), torch.tensor(norm)
    utils.mask_nan_or_inf_with_val_inplace(own)
    stage_1_and_2.mask_nan_or_inf_with_val_inplace(ours, device="cpu")
    assert stage_1_and_2.mask_nan_or_inf_with_val_inplace is not (
        utils.mask_nan_or_inf_with_val_inplace
    )
    assert torch.equal(ours, own)


@pytest.mark.parametrize("precision", ["", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_precision_on_the_command_line_keeps_the_check_off(stage: int, precision: str) -> None:
    """DeepSpeed's check of gradients reads the device; the file's switch lies beside `enabled`."""
    settings = ds_config.read(str(ROOT / "ds_configs" / f"zero{stage}.json"))
    merged = ds_config.merge(settings, config.Config(precision=precision), world=1)
    assert merged.raw["bf16"] == {"enabled": True, "check_grad_overflow": False}


SCRIPT = str(SUPPORT / "sync_step.py")


def test_the_count_on_a_gpu_asks_for_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so the count runs")
    assert run(Forked(1, [SCRIPT, "--json"]), code=1).startswith("no CUDA device: ")


@pytest.mark.gpu
def test_a_real_step_on_a_gpu_waits_for_nothing() -> None:
    """ZeRO-3 reads one flag a step; on a single GPU it waits for a stream at each module, too."""
    ranks = min(2, torch.cuda.device_count())
    printed = run(launch(SCRIPT, "--json", ranks=ranks)).splitlines()
    found = [json.loads(line) for line in printed if line.startswith('{"stage"')]
    assert [row["stage"] for row in found] == [1, 2, 3]
    for row in found:
        assert row["synchronizations"] == 0, row["places"]
        assert row["difference"] <= 1e-3
        assert row["waits_of_deepspeed"] > row["host_reads"]
        assert row["host_reads"] == 0 or row["stage"] == 3, row["places"]
