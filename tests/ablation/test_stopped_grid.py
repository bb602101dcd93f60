"""A grid that is interrupted ends its training in order, and goes on by the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pictures import folder
from runs import ROOT, TINY, environment, reached, saved

from unic_ds.ablation.child import group_lives


def started(root: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, as from a shell."""
    words = ["ablate", str(root / "grid.yaml"), "--out", str(root / "out"), "--views", "0"]
    return subprocess.Popen(
        [sys.executable, "-m", "unic_ds.cli", *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.slow
def test_an_interrupted_grid_saves_and_resumes(tmp_path: Path) -> None:
    for side in ("train", "val"):
        folder(tmp_path / side, 17)
    settings = {key: value for key, value in TINY.items() if key not in ("ds_config", "recipe")}
    settings |= {f"data.{side}": str(tmp_path / side) for side in ("train", "val")}
    settings |= {"optim.steps": 300, "run.save_every": 0}
    plain = {"recipe": "unic_b", "settings": settings, "cells": {"one": {}}, "seeds": [0]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(plain | {"tasks": "knn"}))
    run = tmp_path / "out" / "one" / "seed0"
    process = started(tmp_path)
    while reached(run) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    (trainer,) = children(process.pid)
    os.kill(process.pid, signal.SIGINT)  # not to the group: the command has to pass it on
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT and not group_lives(trainer)
    assert "the same command resumes from the newest checkpoint" in printed
    step = saved(run)
    assert 3 <= step < 300 and not (run / "student").exists()
    again = started(tmp_path)
    printed, _ = again.communicate(timeout=600)
    assert again.returncode == 0, printed
    assert f"resumed after step {step} from " in (run / "train.log").read_text()
    assert reached(run) == 300 and "kNN %" in printed and "+-" not in printed
