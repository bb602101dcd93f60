"""Students that no rank could hold: partitioned, bitwise as unpartitioned; gradients in fp32."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import constants
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from runs import DEMONSTRATION, ROOT, SUPPORT, curve, environment, launch, run, two

from unic_ds import config
from unic_ds.config import ds_keys
from unic_ds.models.ladder import Head
from unic_ds.models.student import Student
from unic_ds.weights import warm_start
from unic_ds.weights.export import export

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def measured(script: str, folder: Path, plan: list[Any], timeout: int = 900) -> list[Any]:
    """Measurements of two ranks for each row of a plan."""
    file = folder / f"{script}.json"
    file.write_text(json.dumps(plan))
    command = launch(SUPPORT / f"{script}.py", file)
    # freed tensors go back to the system, so that what is resident is what is held
    env = environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(file.with_suffix(".measured").read_text())


def row(model: str, size: int, *, bf16: bool = True, **ladder: Any) -> dict[str, Any]:
    """A student of a plan that is compared with an unpartitioned one."""
    return {
        "student": {"model": model, "size": size},
        "ladder": {"width": 48} | ladder,
        "heads": {"a": 12, "b": 20},
        "bf16": bf16,
    }


def model_folder(folder: Path) -> str:
    """Encoder and ladder of a student of another resolution."""
    cfg = config.Student(model="vit_tiny_patch16_224", size=32)
    heads = {"a": Head(12), "b": Head(20)}
    student = Student(cfg, config.Ladder(rungs="5,11", width=48), heads, seed=9)
    path = export(
        student.encoder.state_dict(),
        config.Config(student=cfg),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        folder / "student",
        extras={warm_start.LADDER: student.ladder.export_state_dict()},
    )
    return str(path)


@pytest.mark.dist
@pytest.mark.slow
def test_a_partitioned_student_is_bitwise_the_unpartitioned_one(tmp_path: Path) -> None:
    """Registers, rotary positions, an attention pool, every form of ladder, a start resized."""
    resized = row("vit_tiny_patch16_224", 48, bf16=False, rungs="5,11")
    plan = [
        row("vit_tiny_patch16_224", 32, rungs="5,11"),
        row("vit_tiny_patch16_224", 32, bf16=False, rungs="11", projector="transformer"),
        row("vit_small_patch16_dinov3", 64, rungs="11", midnorm=True),
        resized | {"init": model_folder(tmp_path)},
    ]
    for asked, found in zip(plan, measured("sharded_students", tmp_path, plan), strict=True):
        assert found["partitioned"] and found["differing"] == [], asked


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "last", "bf16", "parameters"),
    [
        ("vit_large_patch14_reg4_dinov2", "23", False, 3e8),
        pytest.param("vit_giant_patch14_clip_224", "39", True, 1e9, marks=pytest.mark.soak),
        pytest.param("vit_gigantic_patch14_clip_224", "47", True, 1.8e9, marks=pytest.mark.soak),
    ],
    ids=["large", "giant", "gigantic"],
)
def test_no_rank_ever_holds_all_weights(
    model: str, last: str, bf16: bool, parameters: float, tmp_path: Path
) -> None:
    """Of two ranks each has half, and at most a parameter or two more: measured 0.55."""
    (found,) = measured("sharded_students", tmp_path, [row(model, 112, bf16=bf16, rungs=last)])
    print(found)  # for docs/ds_configs.md
    assert found["differing"] == []
    assert found["parameters"] > parameters and found["partitioned"]
    assert 0.4 * found["whole"] < found["peak"] < 0.65 * found["whole"]


@DEMONSTRATION
@pytest.mark.dist
@pytest.mark.soak
def test_a_vit_l_takes_the_same_steps_under_every_stage(tmp_path: Path) -> None:
    """ZeRO-2, ZeRO-3 and ZeRO-3 with everything on the CPU, in fp32; the encoder is exported."""
    asked: dict[str, Any] = {
        "student__model": "vit_large_patch14_224",
        "student__size": 112,
        "ladder__rungs": "23",
        "optim__batch_size": 4,
        "optim__steps": 3,
        "optim__warmup_epochs": 0,
        "eval__on": "false",
    }
    losses = {}
    for zero in ("zero2", "zero3", "zero3_offload"):
        out = tmp_path / zero
        run(two(out, zero=zero, **asked), timeout=1800)
        losses[zero] = [row["loss"] for row in curve(out).values()]
        assert (out / "student" / "model.safetensors").stat().st_size > 1.2e9
        shutil.rmtree(out)  # 6 GB
    assert len(losses["zero2"]) == 3
    assert losses["zero3"] == pytest.approx(losses["zero2"], rel=1e-5)
    assert losses["zero3_offload"] == pytest.approx(losses["zero2"], rel=1e-5)


@pytest.mark.dist
@pytest.mark.slow
def test_gradients_are_reduced_and_accumulated_in_fp32(tmp_path: Path) -> None:
    """Exact under ZeRO-2 and 3; under ZeRO-1, where that is not to be had, to bf16's rounding."""
    plan = [[str(file), count] for file in SHIPPED for count in (1, 4)]
    for (file, _), found in zip(plan, measured("reduced_gradients", tmp_path, plan), strict=True):
        assert found["communication"] == "torch.float32"
        assert (found["weights"], found["masters"]) == ("torch.bfloat16", ["torch.float32"])
        bound = 2**-6 if "zero1" in file else 1e-6
        assert found["gradient"] == pytest.approx(found["exact"], rel=bound), file


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_deepspeed_knows_every_key_of_a_shipped_file_and_the_page_explains_it(file: Path) -> None:
    given = json.loads(file.read_text())
    zero = given["zero_optimization"]
    top = {value for value in vars(constants).values() if isinstance(value, str)}
    assert given.keys() - top <= {"zero_optimization", "bf16", "zero_force_ds_cpu_optimizer"}
    pairs = [
        (zero, DeepSpeedZeroConfig),
        (zero.get("offload_optimizer", {}), DeepSpeedZeroOffloadOptimizerConfig),
        (zero.get("offload_param", {}), DeepSpeedZeroOffloadParamConfig),
    ]
    page = (ROOT / "docs" / "ds_configs.md").read_text()
    for keys, model in pairs:
        known = model.model_fields.keys() | {f.alias for f in model.model_fields.values()}
        assert keys.keys() <= known
        assert all(f"`{key}`" in page for key in keys)
    assert all(f"`{key}`" in page for key in given)


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        (DeepSpeedZeroConfig, ds_keys.ZERO),
        (DeepSpeedZeroOffloadParamConfig, ds_keys.ZERO["offload_param"]),
        (DeepSpeedZeroOffloadOptimizerConfig, ds_keys.ZERO["offload_optimizer"]),
    ],
)
def test_files_may_set_every_flag_and_number_that_deepspeed_has(model: Any, taken: Any) -> None:
    known, plain = set(), set()
    for name, field in model.model_fields.items():
        names = {name, field.alias or name}
        known |= names
        plain |= names if field.annotation in (bool, int, float, bool | None) else set()
    assert plain <= taken.keys() <= known
