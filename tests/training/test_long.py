"""Tests that take minutes: the quickstart, over seeds, and recovery of several ranks."""

import json

import pytest
from runs import DEMONSTRATION, curve, kill_on_the_way, launch, launched, run, two

from unic_ds import demo

pytestmark = DEMONSTRATION
MAIN = ["unic_ds/train.py", "--ds_config", "ds_configs/zero2.json"]


def quickstart_rows(out, *more):
    """The table of the main command in a folder of its own."""
    run(launch(*MAIN, "--out", out, *more, ranks=1), timeout=1800)
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_the_quickstart_teaches_its_student(tmp_path):
    slow = demo.precision() == "fp32"  # a CPU that takes twice as long learns a quarter of it
    more = ["--eval.tasks", "knn,linear"]
    if slow:
        more = ["--eval.tasks", "knn", "--eval.max_train", "800", "--optim.epochs", "1"]
    rows = quickstart_rows(tmp_path / "run", *more)
    before, after = rows["student before"], rows["student after"]
    if slow:
        assert after["knn"] > before["knn"]
    else:  # README's promise
        assert after["knn"] >= max(before["knn"] + 10, rows["pixels"]["knn"] + 4)
        assert after["linear"] > before["linear"]


@pytest.mark.soak
def test_three_seeds_reach_what_the_project_promises(tmp_path):
    for seed in (0, 1, 2):
        rows = quickstart_rows(tmp_path / f"seed{seed}", "--seed", str(seed))
        after = rows["student after"]["knn"]
        assert after >= rows["pixels"]["knn"] + 4, (seed, rows)
        assert after >= rows["student before"]["knn"] + 10, (seed, rows)


@pytest.mark.soak
def test_the_loop_costs_less_than_three_percent(tmp_path):
    """Beside a bare DeepSpeed loop; of use only where nothing else runs."""
    words = ["--ds_config", MAIN[2], "--out", tmp_path / "run", "--eval.on", "false"]
    words += ["--precision", "fp32", "--run.log_every", "2"]
    printed = run(launch("tests/support/loop_overhead.py", *words), timeout=1800)
    assert json.loads(next(s for s in printed.splitlines() if s.startswith("{")))["overhead"] < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero3", pytest.param("zero2", marks=pytest.mark.soak)])
def test_two_ranks_killed_at_a_random_moment_give_the_same_curve(tmp_path, zero):
    more = {
        "zero": zero,
        "precision": demo.precision(),
        "optim__batch_size": 8,
        "ladder__rungs": "11",
    }
    more |= {"optim__steps": 10, "run__save_every": 3, "eval__on": "false"}
    run(two(tmp_path / "whole", **more))
    kill_on_the_way(launched(tmp_path / "killed", **more), tmp_path / "killed", 8)
    assert "resumed after step" in run(two(tmp_path / "killed", **more))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
