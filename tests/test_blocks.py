"""Blocks through torch.compile: one code for all, none anew at each step, the same curve."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from runs import DEMONSTRATION, SUPPORT, curve, options, run, together
from runs import TINY as TINY_RUN
from torch import nn

from unic_ds import config, demo
from unic_ds.blocks import compile_each, equal_blocks, from_scratch, uncompiled
from unic_ds.config import ds_config
from unic_ds.models.ladder import Head
from unic_ds.models.student import Student
from unic_ds.teachers.adapters import Tower

IMAGES = demo.root() / demo.PARTS[0]
TINY = config.Student(
    model="vit_tiny_patch16_224", size=32, drop_path=0.3, activation_checkpointing="every:2"
)


def losses(*, compiled: bool) -> tuple[list[float], list[int]]:
    """Five steps of a small student, and how many graphs were compiled after each."""
    torch.manual_seed(0)
    student = Student(
        TINY, config.Ladder(rungs="11", width=16), {"a": Head(12)}, seed=0, compiled=compiled
    ).train()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    image, want = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), torch.randn(2, 12)
    found, graphs = [], []
    for _ in range(5):
        loss = (
            (student(image, torch.rand(2, len(student.paths)))["a"].cls_BC - want).square().mean()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.mark.soak
def test_a_compiled_student_with_recomputed_blocks_has_the_same_curve() -> None:
    """To 1e-4: a fused kernel adds in another order, which AdamW's first steps amplify."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, none = losses(compiled=False)
    ours, graphs = losses(compiled=True)
    assert ours == pytest.approx(eager, rel=1e-4) and eager[-1] < eager[0]
    assert none == [0] * 5
    assert graphs == [graphs[0]] * 5  # drop path's decisions differ at each step
    assert 1 <= graphs[0] <= 2  # timm gives the first block no drop path
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit_tiny_patch16_224", 12), ("vit_small_patch16_dinov3", 12), ("resnet18", 0)],
)
def test_the_blocks_of_a_teacher_are_found(name: str, count: int) -> None:
    tower = Tower()
    with torch.device("meta"):
        tower.model = timm.create_model(name)
    assert len(equal_blocks(tower.blocks(), of=tower)) == count


@pytest.mark.slow
def test_compiled_teachers_give_the_same_features() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = net(image)
        compile_each(equal_blocks(net.blocks, of=net))
        torch.testing.assert_close(net(image), want, rtol=1e-4, atol=1e-5)


@pytest.mark.lengthy
@pytest.mark.slow
@pytest.mark.dist
@DEMONSTRATION
def test_a_compiled_run_is_the_run(tmp_path: Path) -> None:
    """Two ranks under ZeRO-2, student and teachers compiled, and neither; bounds as above."""
    more = {"optim__steps": 4, "eval__on": "false", "optim__lr": 1e-4}
    which = ("none", "all")
    plan = [options(tmp_path / name, run__compile=name, **more) for name in which]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run(together(tmp_path / "plan.json"))
    eager, ours = ([row["loss"] for row in curve(tmp_path / name).values()] for name in which)
    assert ours == pytest.approx(eager, rel=1e-4)


def grown(block: nn.Module, sides: range) -> None:
    """Call a block on batches of so many rows."""
    for side in sides:
        block(torch.ones(side, 2))


@pytest.mark.slow
def test_blocks_on_any_number_of_images_are_one_variant() -> None:
    """As teachers run under lazy dropping; a batch of one image would be another."""
    torch._dynamo.utils.counters.clear()
    block = timm.create_model("test_vit").blocks[0].eval()
    images = {count: torch.randn(count, 5, 64) for count in (8, 5, 3, 7, 2, 8, 6, 4)}
    with from_scratch(True), torch.no_grad():
        eager = {count: block(x_BNC) for count, x_BNC in images.items()}
        compile_each([block], varying=True)
        for count, x_BNC in images.items():
            torch.testing.assert_close(block(x_BNC), eager[count], rtol=1e-4, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        for tokens in (9, 16, 9, 5):  # of other resolutions: a variant each, static in the tokens
            block(torch.randn(4, tokens, 64)), block(torch.randn(3, tokens, 64))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_more_variants_than_torch_keeps_are_an_error_and_a_new_stage_has_none() -> None:
    importlib.import_module("timm.optim")  # it raises the limit of the whole process
    blocks = [nn.Linear(2, 2) for _ in range(2)]
    for block in blocks:  # they share the code of Linear.forward, as blocks of two models do
        block.forward = torch.compile(block.forward, dynamic=False, backend="eager")
    counters = torch._dynamo.utils.counters
    with from_scratch(True):
        grown(blocks[0], range(1, 9))
        counters.clear()
        with pytest.raises(RuntimeError, match="more than 8 variants"), from_scratch(True):
            grown(blocks[0], range(1, 6))
            grown(blocks[1], range(6, 10))
        assert counters["stats"]["unique_graphs"] == 8
    with from_scratch(True):
        grown(blocks[1], range(9, 17))


def test_an_evaluation_compiles_nothing() -> None:
    block = nn.Linear(2, 2)
    block.forward = torch.compile(block.forward, dynamic=False, backend="eager")
    counters = torch._dynamo.utils.counters
    with from_scratch(True):
        counters.clear()
        with uncompiled(True):
            grown(block, range(1, 20))
        assert not counters["stats"]["unique_graphs"]
        grown(block, range(1, 3))
        assert counters["stats"]["unique_graphs"] == 2


def test_what_is_not_compiled_leaves_torch_s_limit_alone() -> None:
    block = nn.Linear(2, 2)
    block.forward = torch.compile(block.forward, dynamic=False, backend="eager")
    with from_scratch(False), uncompiled(False):
        grown(block, range(1, 12))


@pytest.mark.slow
@DEMONSTRATION
def test_each_stage_of_a_compiled_run_compiles_its_blocks_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's blocks are timm's, as DINOv2's are: one code object with the student's.

    Three variants a stage (teacher, the student's first block, its others): the third stage would
    pass dynamo's limit of eight. What dynamo captures runs as it is: the limit is dynamo's.
    """
    monkeypatch.setenv("TORCH_COMPILE_OVERRIDE_BACKENDS", ">=0:eager")
    teacher = {"teachers": "vit=python:timm_teacher:build"}
    stages = "student.size=32 optim.steps=1;student.size=48 optim.steps=1"
    more = {"stages": stages, "student.size": 64, "optim.steps": 2, "run.compile": "all"}
    few = {"data.val_share": 0.25, "eval.max_train": 32, "eval.max_val": 16}
    pairs = TINY_RUN | teacher | more | few | {"data.train": IMAGES, "out": tmp_path / "run"}
    words = [word for key, value in pairs.items() for word in (f"--{key}", str(value))]
    script = SUPPORT / "counted_stages.py"
    printed = run([sys.executable, str(script), str(tmp_path / "graphs"), *words])
    assert "recompile_limit" not in printed
    assert "student after" in printed
    assert json.loads((tmp_path / "graphs").read_text()) == [3, 3, 3]


def test_a_compiled_student_under_zero3_is_refused_and_its_teachers_are_not() -> None:
    file = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    for which in ("student", "all"):
        cfg = config.Config(run=config.Run(compile=which))
        with pytest.raises(ValueError, match="does not go with ZeRO-3"):
            ds_config.merge(file, cfg, 1)
        ds_config.merge(file | {"zero_optimization": {"stage": 2}}, cfg, 1)
    ds_config.merge(file, replace(cfg, run=config.Run(compile="teachers")), 1)
