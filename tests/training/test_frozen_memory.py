"""ZeRO-3 beside frozen models does not grow (DeepSpeed's issue 3286)."""

from __future__ import annotations

import json
import sys

import pytest
from runs import DEMONSTRATION, ROOT, SUPPORT, options, run

pytestmark = [DEMONSTRATION, pytest.mark.slow]


def test_steps_under_zero3_hold_no_more_than_the_first(tmp_path):
    file = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    # every weight is gathered and let go
    file["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(file))
    words = options(
        tmp_path / "run",
        ds_config=tmp_path / "zero3.json",
        optim__steps=40,
        optim__batch_size=4,
        student__model="test_vit",
        data__backend="torch",
    )
    run([sys.executable, str(SUPPORT / "steady_memory.py"), str(tmp_path / "rows"), *words])
    held, resident = zip(*json.loads((tmp_path / "rows").read_text()), strict=True)
    assert len(held) == 5
    # A student's block in fp32 is 0.2 MB; one that stayed in each step would make 6 of eight.
    assert max(held[1:]) - held[0] < 1e5, held
    # The allocator's own ups and downs; the six blocks of each of 24 steps would make 29.
    assert min(resident[-2:]) - min(resident[1:3]) < 10e6, resident


@pytest.mark.parametrize("stage", [pytest.param("zero2", marks=pytest.mark.lengthy), "zero3"])
def test_steps_leave_no_tensors_to_the_collector(tmp_path, stage):
    """Collection waits for a log line: on a GPU such tensors would fill its memory until then."""
    words = options(
        tmp_path / "run",
        stage,
        optim__steps=20,
        optim__batch_size=4,
        student__model="test_vit",
        student__activation_checkpointing="full",
        data__backend="torch",
    )
    run([sys.executable, str(SUPPORT / "step_garbage.py"), str(tmp_path / "rows"), *words])
    found = json.loads((tmp_path / "rows").read_text())
    assert found["objects"] and not found["tensor_bytes"], found
