"""Runs with lazy dropping: one answer however they are spread, killed or resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pictures import folder
from runs import curve, tiny_spread, train_together

LAZY = {
    "drop.lazy": "true",
    "drop.full_every": 4,
    "loss.divisor": "expected",
    "optim.steps": 8,
    "optim.lr": "1e-2",
    "eval.on": "false",
    "run.save_every": 3,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two classes."""
    root = tmp_path_factory.mktemp("lazy")
    folder(root / "train", 24)
    folder(root / "val", 4)
    return root


def words(images: Path, out: str, *, micro: int, stage: int, **more: Any) -> list[str]:
    """The command line of a run."""
    given = LAZY | {name.replace("__", "."): value for name, value in more.items()}
    return tiny_spread(images, out, given, micro=micro, stage=stage)


@pytest.fixture(scope="module")
def whole(images: Path) -> dict[int, dict[str, Any]]:
    """The curve of one process; it also makes the runs `split`, `resumed` and `eager`."""
    runs = [
        words(images, "whole", micro=8, stage=1),
        words(images, "split", micro=2, stage=2),
        words(images, "resumed", micro=8, stage=1, run__stop_at=5),
        words(images, "resumed", micro=8, stage=1),
        words(images, "eager", micro=8, stage=1, drop__lazy="false"),
    ]
    train_together(images, "alone", 1, runs)
    return curve(images / "whole")


def assert_same(found: dict[int, dict[str, Any]], whole: dict[int, dict[str, Any]]) -> None:
    """Equal losses, and equal shares of kept pairs."""
    assert found.keys() == whole.keys()
    for step, row in whole.items():
        for name in ("loss", "narrow/kept", "wide/kept", "narrow/weight"):
            assert found[step][name] == pytest.approx(row[name], rel=1e-5), (step, name)


def test_a_resumed_run_has_every_digit(images: Path, whole: dict[int, dict[str, Any]]) -> None:
    assert curve(images / "resumed") == whole


def test_micro_batches_do_not_change_it(images: Path, whole: dict[int, dict[str, Any]]) -> None:
    assert_same(curve(images / "split"), whole)


def test_it_is_another_run_than_that_of_plain_dropping(
    images: Path, whole: dict[int, dict[str, Any]]
) -> None:
    """Until the first step that is not full it is the same."""
    plain = curve(images / "eager")
    assert plain[1]["loss"] == whole[1]["loss"]
    assert plain[3]["loss"] != whole[3]["loss"]
    known = [step for step, row in whole.items() if "hardest_other" in row]
    assert known == [4, 8]
    kept = [row["narrow/kept"] + row["wide/kept"] for row in whole.values()]
    assert all(1 <= share < 2 for share in kept)


@pytest.mark.dist
def test_ranks_and_stages_do_not_change_it(images: Path, whole: dict[int, dict[str, Any]]) -> None:
    """Ranks with sharded teachers run them as often as each other."""
    sharded = {f"teachers__{name}__placement": "shard" for name in ("narrow", "wide")}
    sharded |= {f"teachers__{name}__micro": 1 for name in ("narrow", "wide")}
    runs = [
        words(images, "zero2", micro=2, stage=2),
        words(images, "zero3", micro=4, stage=3, **sharded),
    ]
    train_together(images, "pair", 2, runs)
    for name in ("zero2", "zero3"):
        assert_same(curve(images / name), whole)
