"""Steps that are not finite, or spikes, change nothing; a run that meets nothing else goes back."""

import json
import math
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import (
    DEMONSTRATION,
    ROOT,
    SUPPORT,
    curve,
    kill_group,
    options,
    run,
    start,
    together,
    two,
)
from safetensors.torch import load_file

from unic_ds.data import order
from unic_ds.training import rollback, step_guard


def judged(one: step_guard.StepGuard, loss: float, norm: float = 1.0) -> bool:
    """True if a step of one micro batch is taken."""
    one.observe(torch.tensor(loss))
    skip = one.found_inf(torch.tensor(norm))
    taken = bool(one.end_step())
    assert bool(skip) != taken
    return taken


def alone_guard(spike: float = 8.0) -> step_guard.StepGuard:
    return step_guard.StepGuard(
        spike, all_gather_fn=lambda local: local[None], device=torch.device("cpu")
    )


def test_the_score_is_the_robust_z_score():
    window_W = torch.full((step_guard.WINDOW,), math.nan)
    window_W[-17:] = torch.arange(17.0)  # median 8, median deviation 4
    loss_N = torch.tensor([8.0, 20.0, math.nan, math.inf])
    z_N = step_guard.scores(loss_N, window_W)
    assert z_N[:2].tolist() == pytest.approx([0, 12 / (1.4826 * 4 + 8e-3)])
    assert z_N[2].isnan() and z_N[3].isposinf()
    window_W[-17 : 1 - step_guard.ENOUGH] = math.nan  # one too few
    assert step_guard.scores(loss_N[:2], window_W).isneginf().all()
    same_W = torch.full((step_guard.WINDOW,), 2.0)  # a loss that never moves
    assert step_guard.scores(torch.tensor([2.001]), same_W).item() == pytest.approx(0.5, rel=1e-3)


def test_spikes_are_skipped_once_there_is_enough_to_judge_by_and_are_not_learned_from():
    one = alone_guard()
    for i in range(step_guard.ENOUGH):
        assert judged(one, 1 + i % 3 / 10)
    window_W = one.window_W
    assert not judged(one, 3.0)
    assert torch.equal(one.window_W.nan_to_num(), window_W.nan_to_num())
    assert judged(one, 0.1), "far below is no spike"
    assert judged(alone_guard(spike=0.0), 1e30)


def test_what_is_not_finite_is_skipped_and_reported_with_the_reason():
    one = alone_guard(spike=0.0)
    steps = [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan), (1.0, 1.0)]
    assert [judged(one, *step) for step in steps] == [True, False, False, False, True]
    found = one.report([one.take_reasons().tolist()], step=14)
    assert found == [(11, "loss", (0,)), (12, "gradient", ()), (13, "loss", (0,))]
    assert one.streak == 0
    judged(one, math.nan)
    one.observe(torch.tensor(1.0))
    assert not one.end_step()  # DeepSpeed refused it without calling `found_inf`
    assert one.report([one.take_reasons().tolist()], step=16) == [
        (15, "loss", (0,)),
        (16, "gradient", ()),
    ]
    assert one.streak == 2
    again = alone_guard()
    again.load_state_dict(one.state_dict())
    assert again.streak == 2
    assert torch.equal(again.window_W.nan_to_num(), one.window_W.nan_to_num())
    assert torch.isfinite(again.window_W).sum() == 2


def test_all_ranks_skip_and_know_whose_loss_it_was():
    losses_P = torch.tensor([1.0, math.nan, 2.0])
    guards = [
        step_guard.StepGuard(0.0, all_gather_fn=lambda local: losses_P, device=torch.device("cpu"))
        for _ in losses_P
    ]
    for one, loss in zip(guards, losses_P.tolist(), strict=True):
        assert not judged(one, loss)
    reason_PK = [one.take_reasons().tolist() for one in guards]
    assert [one.report(reason_PK, 1) for one in guards] == [[(1, "loss", (1,))]] * 3


spans = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), max_size=5)


@given(spans, st.integers(1, 60))
def test_steps_read_what_is_not_left_out(spans, step):
    pairs = [(first, first + more) for first, more in spans]
    gone = {at for first, last in pairs for at in range(first, last + 1)}
    left_out = order.joined(pairs)
    assert {at for first, last in left_out for at in range(first, last + 1)} == gone
    assert all(b[0] > a[1] + 1 for a, b in pairwise(left_out))
    kept = [at for at in range(1, 200) if at not in gone]
    assert order.data_step(step, left_out) == kept[step - 1]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
IMAGES, BATCH = 128, 4


def names_of(step: int) -> list[str]:
    """The samples of a step of the order, by position."""
    index_B, _ = order.batch(0, (order.SampleGroup(IMAGES),), (step - 1) * BATCH, BATCH)
    return [f"{i:03d}.png" for i in index_B]


def pictures(folder: Path, faulty: dict[int, tuple[int, tuple[int, int, int]]]) -> Path:
    """Noise, but for step -> (position, colour)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    coloured = {names_of(step)[at]: colour for step, (at, colour) in faulty.items()}
    for i in range(IMAGES):
        noise_HWC = rng.integers(60, 200, (32, 32, 3), dtype=np.uint8)
        if colour := coloured.get(f"{i:03d}.png"):
            noise_HWC[:] = colour
        Image.fromarray(noise_HWC).save(folder / f"{i:03d}.png")
    return folder


TINY = {
    "teachers": "faulty=python:faulty_teacher:build",
    "teachers__faulty__precision": "fp32",
    **{f"teachers__{n}__{k}": None for n in ("dinov2", "effnet") for k in ("size", "precision")},
    "student__model": "test_vit",
    "ladder__rungs": "5",
    "ladder__width": 48,
    "loss__cls": "smooth_l1",
    "loss__patch": "smooth_l1",
    "standardise__target_clamp": 0,
    "data__augment": "none",
    "data__val_share": 0,
    "optim__batch_size": BATCH,
    "optim__warmup_epochs": 0,
    "eval__on": "false",
    "run__save_every": 1,
}
SPIKE, LOST = step_guard.ENOUGH + 2, step_guard.ENOUGH + 3
EACH = {"optim__steps": LOST + 1, "run__keep_last": 4, "run__spike": 8}
"""A spike, then a loss that is no number, then a sound step; a checkpoint around each."""
STEEP = "10000000000 mse"
FIRST, ROW = 5, 3
BACK = {
    "optim__steps": 10,
    "run__save_every": 2,
    "run__keep_last": 1,
    "run__rollback_after": ROW,
}
"""Losses that are not finite in steps 5, 6 and 7, and checkpoints at 4 and 6."""
STAGES = [f"{precision}_zero{stage}" for precision in ("fp32", "bf16") for stage in range(4)]
ALL = [*STAGES, "unchecked", "offload"]


@pytest.fixture(scope="module", autouse=True)
def teacher_on_the_path():
    """The faulty teacher's folder for every process that is started here."""
    with pytest.MonkeyPatch.context() as patch:
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(SUPPORT))))
        patch.setenv("PYTHONPATH", path)
        yield


def settings(file: Path, stage: int, **bf16: bool) -> Path:
    """A ds_config of that stage."""
    zero2 = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    zero2["bf16"] |= bf16
    if stage < 2:
        zero2.pop("data_types")
    file.write_text(json.dumps(zero2 | {"zero_optimization": {"stage": stage}}))
    return file


@pytest.fixture(scope="module")
def folders(demonstration, tmp_path_factory):
    """Runs of two ranks in one launch, by name, and their images."""
    out = tmp_path_factory.mktemp("guard")
    images = pictures(out / "images", {SPIKE: (3, BLUE), LOST: (0, GREEN)})
    steep = pictures(out / "steep", {3: (1, WHITE)})
    faulty = pictures(out / "faulty", {FIRST + i: (i, RED) for i in range(ROW)})
    plan = []
    for name in STAGES:
        precision, stage = name.split("_zero")
        more = {"ds_config": settings(out / f"{name}.json", int(stage)), "precision": precision}
        plan.append(options(out / name, data__train=images, **TINY | EACH | more))
    unchecked = settings(out / "unchecked.json", 2, check_grad_overflow=False)
    more = TINY | EACH | {"ds_config": unchecked, "precision": "", "optim__ema": 0.9}
    plan.append(options(out / "unchecked", data__train=images, **more))
    more = TINY | EACH | {"precision": ""}
    plan.append(options(out / "offload", zero="zero3_offload", data__train=images, **more))
    more = {"loss__cls": STEEP, "loss__patch": STEEP, "optim__steps": 4, "run__save_every": 9}
    plan.append(options(out / "gradient", data__train=steep, **TINY | more))
    plan.append(options(out / "back", data__train=faulty, **TINY | BACK))
    (out / "plan.json").write_text(json.dumps(plan))
    run(together(out / "plan.json"), timeout=590)
    return out


def tensors(value, at=""):
    """Every tensor in a checkpoint's nested values, by where it is."""
    if isinstance(value, torch.Tensor):
        yield at, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{at}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from tensors(inner, f"{at}/{i}")


def remembered(folder: Path, step: int) -> dict[str, bytes]:
    """Weights, masters, moments, counters, statistics and window of a checkpoint, as bytes."""
    saved = folder / "checkpoints" / f"step_{step:07d}"
    found = load_file(saved / "statistics.safetensors")
    del found["guard/streak"]
    for file in sorted((saved / "zero").glob("*.pt")):
        state = torch.load(file, map_location="cpu", weights_only=False)
        found |= {f"{file.name}{at}": value for at, value in tensors(state)}
    return {
        at: bytes(x.contiguous().view(torch.uint8).numpy()) if x.dim() else x.numpy().tobytes()
        for at, x in found.items()
    }


def events(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert all(row.pop("time") for row in rows)
    return rows


def skipped(step: int, why: str, rank: int) -> dict:
    """The event of a step whose rank was to blame, of two ranks with one micro batch each."""
    names = {str(rank): names_of(step)[rank * 2 : rank * 2 + 2]}
    told = {"event": "skipped", "step": step, "data_step": step, "why": why}
    return told | {"ranks": [rank], "samples": names}


def faulty_image(name: str) -> pytest.MarkDecorator:
    return pytest.mark.fault(f"features of an image NaN, or 1000 x ({name})", "the step is skipped")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", [pytest.param(name, marks=faulty_image(name)) for name in ALL])
def test_a_skipped_step_changes_not_a_bit_and_the_next_is_taken(folders, name):
    folder = folders / name
    before, spike, lost, after = (remembered(folder, step) for step in range(SPIKE - 1, LOST + 2))
    assert before == spike == lost
    changed = [at for at in lost if lost[at] != after[at]]
    assert any(at.endswith("exp_avg") for at in changed)
    assert any("module" in at or "fp32" in at for at in changed)
    assert {"faulty.mean_2C", "faulty.std_2C", "guard/window_W"} <= set(changed)
    assert events(folder) == [skipped(SPIKE, "spike", 1), skipped(LOST, "loss", 0)]
    rows = curve(folder)
    assert [step for step, row in rows.items() if row["skipped"]] == [SPIKE, LOST]
    assert all(math.isfinite(row["loss"]) for row in rows.values())


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.fault("a gradient not finite, of a finite loss", "the step is skipped")
def test_a_gradient_that_is_not_finite_is_told_with_all_samples(folders):
    (event,) = events(folders / "gradient")
    names = names_of(3)
    assert (event["why"], event["step"], event["ranks"]) == ("gradient", 3, [])
    assert event["samples"] == {"0": names[:2], "1": names[2:]}
    rows = curve(folders / "gradient")
    assert 1e30 < rows[3]["loss"] < math.inf
    assert rows[4]["loss"] < 1e13
    assert [row["skipped"] for row in rows.values()] == [0, 0, 1, 0]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.fault("three steps in a row not finite", "it goes back, and on past their images")
def test_a_run_goes_back_and_on_past_the_faulty_samples(folders):
    folder = folders / "back"
    told = events(folder)
    back = {"at": 7, "to": 4, "left_out": [5, 7]}
    assert told[:-1] == [skipped(5, "loss", 0), skipped(6, "loss", 0), skipped(7, "loss", 1)]
    assert told[-1] == {"event": "rolled back"} | back
    assert json.loads((folder / "rollbacks.json").read_text()) == [back]
    rows = curve(folder)
    assert list(rows) == list(range(1, 11))
    assert all(math.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows.values())
    facts = json.loads((folder / "checkpoints" / "step_0000010" / "run.json").read_text())
    assert facts["rollbacks"] == [back]
    assert [p.name for p in (folder / "checkpoints").glob("step*")] == ["step_0000010"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.fault("kill -9 just after a roll-back", "the same command gives the same curve")
def test_a_kill_after_a_roll_back_forgets_nothing(folders, tmp_path):
    out = tmp_path / "run"
    command = {"data__train": folders / "faulty"} | TINY | BACK
    process = start(two(out, **command))
    while not (out / "rollbacks.json").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.002)
    kill_group(process)
    assert max(p.name for p in (out / "checkpoints").glob("step*")) <= "step_0000006"
    printed = run(two(out, **command))
    assert "resumed after step 4" in printed
    assert curve(out) == curve(folders / "back")
    assert [row["event"] for row in events(out)].count("rolled back") <= 1


@DEMONSTRATION
@pytest.mark.slow
@pytest.mark.fault(
    "images that are faulty after each roll-back", "it stops: exit 1, steps, samples"
)
def test_a_run_that_went_back_often_enough_stops_and_may_be_allowed_more(tmp_path):
    pictures(tmp_path / "images", dict.fromkeys(range(6, 15), (0, RED)))
    out, more = tmp_path / "run", TINY | BACK | {"data__train": tmp_path / "images"}
    printed = run(two(out, **more, run__max_rollbacks=2), code=1)
    assert "steps 5 to 7 were all skipped, and it went back 2 times already" in printed
    assert "events.jsonl" in printed and "--run.max_rollbacks" in printed
    rows = json.loads((out / "rollbacks.json").read_text())
    assert [(row["at"], row["to"], row["left_out"]) for row in rows] == [
        (8, 4, [6, 8]),
        (8, 4, [5, 11]),  # the same checkpoint again: all that was read since
    ]
    told = events(out)
    says = told[-1].pop("says")
    assert told[-1] == {"event": "stopped", "job": "", "first": 5, "last": 7}
    assert says in printed
    assert [row["data_step"] for row in told if row["event"] == "skipped"] == list(range(6, 15))
    assert "resumed after step 4" in run(two(out, **more, run__max_rollbacks=3))
    assert list(curve(out)) == list(range(1, 11))
    assert json.loads((out / "rollbacks.json").read_text())[2]["left_out"] == [12, 14]


@pytest.mark.slow
@pytest.mark.fault("a learning rate that explodes at once", "it stops: exit 1, with the reason")
def test_a_run_with_nothing_to_go_back_to_stops(folders, tmp_path):
    more = TINY | {"data__train": folders / "faulty", "optim__lr": 1e36, "run__save_every": 100}
    printed = run(two(tmp_path / "run", **more, optim__steps=20), code=1)
    assert "steps 2 to 6 were all skipped, and there is no checkpoint from before" in printed
    assert "--optim.lr" in printed


def test_a_damaged_checkpoint_does_not_stop_a_run_that_went_back(tmp_path):
    """Facts that a kill during removal, or a disk, damaged are no reason to fail."""
    (tmp_path / "rollbacks.json").write_text(json.dumps([{"at": 7, "to": 4, "left_out": [5, 7]}]))
    for step, facts in ((4, '{"rollbacks": []}'), (5, '{"rollbacks": []}'), (6, "{"), (7, None)):
        folder = tmp_path / "checkpoints" / f"step_{step:07d}"
        folder.mkdir(parents=True)
        if facts:
            (folder / "run.json").write_text(facts)
    assert rollback.prune_abandoned(tmp_path) == [{"at": 7, "to": 4, "left_out": [5, 7]}]
    left = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert left == ["step_0000004", "step_0000006", "step_0000007"]
