"""`--teachers auto` by real comparisons: on ranks, resumed, interrupted, under the launcher."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from forked import Forked
from pictures import folder
from runs import TRAIN, launch, run, saved, start, tiny, verb
from timm_teacher import save_vits

from unic_ds.config import auto_teachers, recipes, teacher_choice
from unic_ds.files import run_files

IMAGES = 25
COMPARES = "--teachers auto: comparing 3 teachers"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and the weights of two teachers."""
    root = tmp_path_factory.mktemp("auto")
    folder(root / "train", IMAGES)
    folder(root / "val", 4)
    save_vits(root, "ab")
    return root


def words(root: Path, out: str, **more: object) -> list[str]:
    """A run of one of two ViTs that cost the same, and of a third teacher that costs little."""
    among = ",".join(f"{x}=file:{root / x}.safetensors#arch=test_vit" for x in "ab")
    options = {"teachers": "auto", "among": f"{among},n=python:small_teacher:narrow"}
    options |= {f"teachers.{name}.precision": "fp32" for name in "abn"}
    options |= {
        "budget": "0.0031",
        "eval.on": "false",
        "eval.size": "64",
        "eval.cache": str(root / "cache"),
    }
    return tiny(root, out, options | {key.replace("__", "."): more[key] for key in more})


@pytest.mark.dist
def test_a_failed_or_interrupted_comparison_leaves_nothing(made: Path) -> None:
    """SIGINT while it runs, and a budget that no teacher fits."""
    out = made / "runs" / "never"
    process = start(Forked(1, [TRAIN, *words(made, "runs/never", eval__cache="none")]))
    while not (out / auto_teachers.BEAT).exists() or not compares(process.pid):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    (child,) = compares(process.pid)
    time.sleep(2)  # into its imports
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "unic_ds: ended by SIGINT" in printed
    assert not child.is_running() and not out.parent.exists()
    printed = run(Forked(1, [TRAIN, *words(made, "runs/never", budget="1e-9")]), code=2)
    assert printed.count("unic_ds: error: --budget 1e-09 GFLOPs fits no teacher: the cheapest") == 1
    assert "Traceback" not in printed and not out.parent.exists()


def compares(pid: int) -> list[psutil.Process]:
    """The comparisons among the children of a process."""
    return [child for child in psutil.Process(pid).children() if "compare" in child.cmdline()]


@pytest.mark.dist
def test_a_run_of_two_ranks_chooses_once(made: Path) -> None:
    """A plan and another start take the choice; config.yaml has the chosen teachers."""
    out = made / "run"
    printed = run(Forked(2, [TRAIN, *words(made, "run", run__stop_at=2)]))
    assert printed.count(COMPARES) == 1 and "stopped after step 2 of 3" in printed
    choice = teacher_choice.read(out)
    assert choice and set(choice.candidates) == set("abn") and len(choice.chosen) == 2
    (left,) = choice.left_out
    found = json.loads((out / run_files.COMPARISON).read_text())
    assert found["images"] == IMAGES and found["selection"]["left_out"] == choice.left_out
    sizes = {teacher["size"] for teacher in found["teachers"].values()}
    assert 64 not in sizes  # the side of images of the run's table
    assert [x["coverage"] for x in found["selection"]["steps"]] == [
        step.coverage for step in choice.steps
    ]
    first, second = choice.steps
    gain, cost = second.coverage - first.coverage, second.cost - first.cost
    assert f"{first.teacher} (+{first.coverage:.3f} for {first.cost:.3g} GFLOPs)" in printed
    assert f"{second.teacher} ({gain:+.3f} for {cost:.3g} GFLOPs)" in printed
    assert re.search(rf"^left out: {left} costs .* are left$", printed, re.M)
    assert f"not used, of teachers that were left out: --teachers.{left}.precision" in printed
    names = [name for name in "abn" if name != left]
    assert [row.name for row in recipes.read(out / "config.yaml").teachers] == names
    assert (out / run_files.COMPARISON_PICTURE).is_file() and not (
        out / auto_teachers.BEAT
    ).exists()

    planned = run(verb("plan", "--json", "true", "--gpus", "2", *words(made, "run")))
    assert COMPARES not in planned and json.loads(planned.splitlines()[-1])
    printed = run(Forked(2, [TRAIN, *words(made, "run")]))
    assert COMPARES not in printed and "resumed after step 2" in printed
    assert saved(out) == 3


@pytest.mark.slow
@pytest.mark.dist
def test_the_launchers_ranks_choose_and_train(made: Path) -> None:
    printed = run(launch(TRAIN, *words(made, "launched")))
    assert printed.count(COMPARES) == 1 and "saved step_0000003" in printed
    choice = teacher_choice.read(made / "launched")
    assert choice and len(recipes.read(made / "launched" / "config.yaml").teachers) == 2
    refused = run(launch(TRAIN, *words(made, "refused", budget="1e-9")), code=2)
    assert refused.count("fits no teacher") == 1 and not (made / "refused").exists()
