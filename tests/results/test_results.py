"""The parts of `make results`: its grid, a set, its table."""

from __future__ import annotations

import json
from pathlib import Path

import image_sets
import pytest
from pictures import folder
from promise import Grid, table
from runs import ROOT, run, verb

from unic_ds import demo

HERE = ROOT / "tests" / "results"


@pytest.fixture
def images(demonstration: None, tmp_path: Path) -> Path:
    """As `image_sets` lays them out, but of drawn images."""
    for one in ("solar", "clipart", "stamps", "fashion"):
        for side in ("train", "val"):
            folder(tmp_path / "sets" / one / side, 17)
    (tmp_path / "quickstart").symlink_to(demo.root())
    image_sets.write_lists(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["results", "start"])
def test_the_grids_are_accepted(name: str, images: Path) -> None:
    (images / "start.safetensors").touch()
    grid = (HERE / f"{name}.yaml").read_text().replace("runs/results", str(images))
    (images / "grid.yaml").write_text(grid)
    words = ("ablate", images / "grid.yaml", "--out", images / "out", "--dry_run", "true")
    assert "tasks: transfer,transfer_knn" in run(verb(*words))


@pytest.mark.skipif(not image_sets.STAMPS.is_dir(), reason="needs tuxpaint-stamps-default")
def test_a_set_has_each_picture_once_and_classes_on_both_sides(tmp_path: Path) -> None:
    image_sets.write(image_sets.stamps(), tmp_path / "stamps")
    names = [path.name for path in tmp_path.rglob("*.png")]
    assert len(names) == len(set(names)) > 600
    classes = {
        side: {path.name for path in (tmp_path / "stamps" / side).iterdir()}
        for side in ("train", "val")
    }
    assert classes["train"] == classes["val"] and len(classes["val"]) == 8


def test_scores_are_means_of_both_classifiers_and_compared_seed_by_seed(tmp_path: Path) -> None:
    values = {
        "transfer_knn a": {"cell": (50, 52), "one": (60, 60), "two": (40, 70)},
        "transfer a": {"cell": (70, 72), "one": (60, 60), "two": (40, 70)},
        "transfer_knn b": {"cell": (80, 82), "one": (90, 90), "two": (30, 30)},
        "transfer b": {"cell": (80, 82), "one": (90, 90), "two": (30, 30)},
        "transfer mean": {"cell": (75, 77), "one": (75, 75), "two": (35, 50)},
    }
    measures = [
        {
            "name": name,
            "cells": {"cell": {"values": dict(zip("01", found["cell"], strict=True))}},
            "teachers": {
                teacher: {"values": dict(zip("01", found[teacher], strict=True))}
                for teacher in ("one", "two")
            },
        }
        for name, found in values.items()
    ]
    (tmp_path / "ablation.json").write_text(json.dumps({"measures": measures}))
    grid = Grid(tmp_path)
    assert grid.sets == ["a", "b"] and grid.best_single() == "one"
    assert grid.cells["cell"] == {"0": {"a": 60, "b": 80}, "1": {"a": 62, "b": 82}}
    assert grid.differences(grid.cells["cell"], "a") == [0, -8]  # the better teacher changes
    assert grid.to_best_single(grid.cells["cell"]) == [-5, -3]
    rows = table(grid)
    assert rows[2].startswith("| `cell` | 61.0 +- 1.4 (-4.0 +- 5.7) | 81.0 +- 1.4 (-9.0 +- 1.4) |")
    assert rows[2].endswith("| 71.0 +- 1.4 | -4.0 +- 1.4 |")
