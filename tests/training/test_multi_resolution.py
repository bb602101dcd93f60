"""Runs whose steps draw their resolution: one answer however they are spread, killed or resumed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import folder
from runs import curve, tiny_spread, train_together

from unic_ds.config import Config, Data, Student, Teacher, args, job
from unic_ds.config.ds_config import DeepSpeedSettings
from unic_ds.models.step_resolutions import StepResolutions
from unic_ds.training import acceptance

SIZES = (32, 48, 64)
DRAWN = {
    "teachers": "following=python:small_teacher:following,wide=python:small_teacher:wide",
    "data.sizes": "32,48,64",
    "loss.divisor": "expected",
    "optim.steps": 8,
    "optim.lr": "1e-2",
    "eval.on": "false",
    "run.save_every": 3,
}

SHIFTED = {
    "data__size_draw": "independent",
    "loss__shift": 1,
    "drop__lazy": "true",
    "drop__full_every": 4,
}
"""Further levers that choose what a step sees."""


def resolutions(**changes: Any) -> StepResolutions:
    """Those of a run with one teacher that follows the student's grid, and one that does not."""
    cfg = Config(
        teachers=(
            Teacher(name="a", source="timm:vit_tiny_patch16_224"),
            Teacher(name="b", size=96, source="timm:vit_tiny_patch16_224"),
        ),
        student=Student(model="test_vit", size=32),
        data=Data(sizes=SIZES, **changes),
    )
    settings = DeepSpeedSettings(raw={}, micro_batch=8, accumulation=2)
    grids = [size // 16 for size in SIZES]
    sides = {"a": {grid: 14 * grid for grid in grids}, "b": dict.fromkeys(grids, 96)}
    return StepResolutions(cfg, settings, sides)


def test_every_size_is_drawn_as_often_by_seed_and_step() -> None:
    drawn = resolutions()
    found = [drawn.of_step(step) for step in range(1, 1501)]
    for size in SIZES:
        assert 430 < sum(one.size == size for one in found) < 570  # 500 +- 4 deviations
    assert all(one.sides == {"a": 14 * one.grid, "b": 96} for one in found)
    other = StepResolutions(replace(drawn.cfg, seed=1), drawn.settings[0], drawn.sides_of)
    assert [other.of_step(step).size for step in range(1, 101)] != [one.size for one in found[:100]]
    assert drawn.of_step(7) == drawn.of_step(7)


def test_teachers_may_draw_their_own_size() -> None:
    drawn = resolutions(size_draw="independent")
    found = [drawn.of_step(step) for step in range(1, 1501)]
    pairs = [(one.size, one.sides["a"]) for one in found]
    for pair in {(size, 14 * other // 16) for size in SIZES for other in SIZES}:
        assert 115 < pairs.count(pair) < 220  # 167 +- 4 deviations
    assert drawn.shape_of(1).sides == (found[0].size, found[0].sides["a"], 96)
    for one in found:  # 4 patch tokens of 8 images, of student or teacher
        assert one.micro_batch * max(one.grid, one.sides["a"] // 14) ** 2 <= 32


@pytest.mark.parametrize(
    ("tokens", "micro"),
    [(0, {32: 8, 48: 2, 64: 2}), (144, {32: 16, 48: 16, 64: 8}), (16, {32: 4, 48: 1, 64: 1})],
)
def test_micro_batches_stay_within_the_tokens(tokens: int, micro: dict[int, int]) -> None:
    """The largest divisor of a rank's 16 images; without a number, 8 images of 4 tokens."""
    drawn = resolutions(tokens=tokens)
    for one in map(drawn.of_step, range(1, 30)):
        assert one.micro_batch == micro[one.size]
        assert one.micro_batch * one.micro_batches == 16
    assert drawn.most == max(micro.values())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two classes."""
    root = tmp_path_factory.mktemp("drawn")
    folder(root / "train", 24)
    folder(root / "val", 4)
    return root


def words(images: Path, out: str, *, micro: int, stage: int, **more: Any) -> list[str]:
    """The command line of a run."""
    given = DRAWN | {name.replace("__", "."): value for name, value in more.items()}
    return tiny_spread(images, out, given, micro=micro, stage=stage)


@pytest.fixture(scope="module")
def whole(images: Path) -> dict[int, dict[str, Any]]:
    """The curve of one process; it also makes the other runs of one process."""
    runs = [
        words(images, "whole", micro=8, stage=1, data__tokens=256),
        words(images, "budget", micro=8, stage=2, data__tokens=16),
        words(images, "resumed", micro=8, stage=1, data__tokens=256, run__stop_at=5),
        words(images, "resumed", micro=8, stage=1, data__tokens=40),
        words(images, "fixed", micro=8, stage=1, data__sizes="", optim__steps=3),
        words(images, "own", micro=8, stage=2, **SHIFTED),
        words(images, "fitted", micro=4, stage=0, standardise__fit_steps=2),
    ]
    train_together(images, "alone", 1, runs)
    return curve(images / "whole")


def assert_same(
    found: dict[int, dict[str, Any]],
    whole: dict[int, dict[str, Any]],
    names: tuple[str, ...] = ("loss", "following/patch_cosine", "wide/kept"),
) -> None:
    """Equal losses and distances."""
    assert found.keys() == whole.keys()
    for step, row in whole.items():
        for name in names:
            assert found[step][name] == pytest.approx(row[name], rel=1e-5), (step, name)


def test_the_token_budget_does_not_change_the_answer(
    images: Path, whole: dict[int, dict[str, Any]]
) -> None:
    assert_same(curve(images / "budget"), whole)


def test_a_resumed_run_goes_on_with_the_same_resolutions(
    images: Path, whole: dict[int, dict[str, Any]]
) -> None:
    """Up to its stop, with the same micro batches, in every digit."""
    found = curve(images / "resumed")
    assert all(found[step] == whole[step] for step in range(1, 6))
    assert_same(found, whole)


def test_a_step_at_the_students_own_size_is_that_of_a_run_without_sizes(
    images: Path, whole: dict[int, dict[str, Any]]
) -> None:
    drawn = [resolutions().of_step(step).size for step in range(1, 9)]
    fixed = curve(images / "fixed")
    assert set(drawn) == set(SIZES)
    first = drawn.index(32) + 1
    if first == 1:
        assert whole[1]["loss"] == fixed[1]["loss"]
    differing = next(step for step in range(1, 9) if drawn[step - 1] != 32)
    assert whole[differing]["loss"] != fixed.get(differing, {}).get("loss")


@pytest.mark.dist
def test_ranks_and_stages_do_not_change_it(images: Path, whole: dict[int, dict[str, Any]]) -> None:
    runs = [
        words(images, "zero2", micro=2, stage=2, data__tokens=64),
        words(images, "zero3", micro=4, stage=3),
        words(images, "zero1", micro=4, stage=1, data__tokens=16),
        words(images, "own2", micro=2, stage=3, data__tokens=32, **SHIFTED),
        words(images, "fitted2", micro=4, stage=2, standardise__fit_steps=2),
    ]
    train_together(images, "pair", 2, runs)
    for name in ("zero2", "zero3", "zero1"):
        assert_same(curve(images / name), whole)
    # Distances of lazy steps are means over a micro batch's computed images.
    assert_same(curve(images / "own2"), curve(images / "own"), ("loss", "wide/kept"))
    assert_same(curve(images / "fitted2"), curve(images / "fitted"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"data__sizes": "32,40"},
            "data.sizes has 40, which is not a multiple of test_vit's patch size 16",
        ),
        (
            {"data__tokens": 15},
            "data.tokens 15 is less than the 16 patch tokens of one image of 64 px; raise it, or"
            " drop it for the ds_config's micro batch",
        ),
        (
            {"micro": 1},
            "the ds_config's micro batch of 1 has 4 patch tokens at student.size 32, less than one"
            " image of 64 px (16); give --data.tokens 16 or more",
        ),
        ({"loss__shift": 2}, "loss.shift must be below 2 patches, the student's grid, got 2"),
        (
            {"loss__shift": 1, "teachers__wide__resize": "larger"},
            "loss.shift must be 0 with teachers.wide.resize larger",
        ),
        (
            {"loss__shift": 1, "teachers__cache": "features"},
            "loss.shift must be 0 with teachers.cache",
        ),
        ({"data__sizes": "32"}, "data.sizes must be two or more (or empty), got (32,)"),
        ({"data__sizes": "32,32"}, "data.sizes must be distinct, got (32, 32)"),
        ({"data__sizes": "", "data__tokens": 16}, "data.tokens must be 0 if data.sizes is empty"),
        (
            {"teachers__wide__placement": "shard"},
            "teachers.wide.placement must be replicate with data.sizes (or give"
            " teachers.wide.size), got 'shard'",
        ),
        (
            {"teachers__following__precision": "int8"},
            "teachers.following.precision must be bf16 or fp32 with data.sizes (or give"
            " teachers.following.size), got 'int8'",
        ),
        (
            {"student__model": "beit_base_patch16_224"},
            "student.model 'beit_base_patch16_224' takes images of one side alone",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(
    images: Path, more: dict[str, Any], message: str
) -> None:
    given = {"micro": 8, "stage": 1} | more
    with pytest.raises(ValueError, match=re.escape(message)):
        task = job.resolve(args.parse(["train", *words(images, "refused", **given)])[1], 1)
        acceptance.accept([task], starting=True)
