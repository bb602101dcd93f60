"""Grids from files, presets and axes; mistakes are one sentence before anything starts."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import DEMONSTRATION, ROOT

from unic_ds import cli
from unic_ds.ablation import ablate, grid, job_array, reuse
from unic_ds.ablation.cells import Study, shared_images
from unic_ds.ablation.checks import check_cells
from unic_ds.ablation.shared_features import features_of, live_reason
from unic_ds.cli.ablate import folder_of
from unic_ds.config import overrides
from unic_ds.config.ablations import PRESETS
from unic_ds.process import entry_point


def test_axes_are_multiplied() -> None:
    found = grid.read(["drop.rate=0,0.5", "ladder.rungs=last;5,11"], {"optim.lr": "0.1"})
    assert (found.count, found.runs, found.name) == (4, 12, "drop.rate_ladder.rungs")
    assert found.settings == {"optim.lr": "0.1"}
    assert found.all_cells() == {
        "rate-0_rungs-last": {"drop.rate": "0", "ladder.rungs": "last"},
        "rate-0_rungs-5-11": {"drop.rate": "0", "ladder.rungs": "5,11"},
        "rate-0.5_rungs-last": {"drop.rate": "0.5", "ladder.rungs": "last"},
        "rate-0.5_rungs-5-11": {"drop.rate": "0.5", "ladder.rungs": "5,11"},
    }


def test_a_file_has_cells_and_axes(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    plain = {
        "recipe": "quickstart+radio",
        "settings": {"optim": {"epochs": 1}, "data.flip": 0},
        "cells": {"one": None, "two": {"standardise": {"on": False}, "eval": {"k": [3, 5]}}},
        "axes": {"drop.lazy": [True, False]},
        "seeds": [3, 5],
        "tasks": ["knn", "rankme"],
        "baseline": "two",
    }
    file.write_text(yaml.safe_dump(plain))
    found = grid.read([str(file)], {"data.flip": "0.5"}, seeds="7")
    assert (found.name, found.recipe, found.seeds) == ("small", "quickstart+radio", (7,))
    assert found.settings == {"optim.epochs": "1", "data.flip": "0.5"}
    assert found.tasks == "knn,rankme" and found.baseline == "two"
    assert found.all_cells() == {
        "one": {},
        "two": {"standardise.on": "False", "eval.k": "3,5"},
        "lazy-true": {"drop.lazy": "true"},
        "lazy-false": {"drop.lazy": "false"},
    }


@DEMONSTRATION
def test_the_file_of_the_docs_is_a_grid(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ablate.md").read_text(), re.S)
    (tmp_path / "grid.yaml").write_text(text)
    study = Study(grid=grid.read([str(tmp_path / "grid.yaml")], {}), out=tmp_path / "out")
    check_cells(study)
    assert len(study.cells) == 7 and study.compared_with("alone") == "baseline"


MISTAKES: dict[str, tuple[object, str]] = {
    "no grid": (["componets"], "no grid 'componets' (did you mean components?)"),
    "a list": ([1], "holds no grid"),
    "unknown key": ({"cell": {}}, "has no 'cell' (did you mean cells?)"),
    "no cells": ({"seeds": [0]}, "the grid has no cells"),
    "name": ({"cells": {"../x": {}}}, "a cell's name must be letters"),
    "folder": ({"cells": {"features": {}}}, "not features, eval, pixels"),
    "same values": ({"axes": {"optim.lr": [1, 1]}}, "must be a list of different values"),
    "seeds": ({"cells": {"a": {}}, "seeds": [0, 0]}, "seeds must be different whole numbers"),
    "seed": ({"axes": {"seed": [0, 1]}}, "seed must be given as --seeds 0,1,2, got"),
    "plugins": ({"cells": {"a": {"plugins": "x"}}}, "plugins must be the same in all cells"),
    "task": ({"cells": {"a": {}}, "tasks": "knm"}, "no task 'knm' (did you mean knn?)"),
    "setting": (
        {"cells": {"a": {}, "b": {"optim.lrr": 1}}},
        "cell b: unknown option --optim.lrr (did you mean optim.lr?)",
    ),
    "value": ({"cells": {"a": {"drop.rate": 2}}}, "cell a: drop.rate must be in [0, 1], got 2.0"),
    "nothing": ({"cells": {"a": {"drop.rate": None}}}, "drop.rate has no value"),
    "equal": (
        {"cells": {"a": {}, "b": {"drop.rate": 0.25}, "c": {"drop.rate": "0.250"}}},
        "the cells a and b have equal settings; leave one of them out",
    ),
    "baseline": ({"cells": {"a": {}}, "baseline": "z"}, "one of a, got 'z'"),
    "evaluation": ({"cells": {"a": {"eval.k": 3}}}, "cell a: eval.k must be the same in all cells"),
    "teacher's name": ({"cells": {"dinov2": {}}}, "another than a teacher's, got 'dinov2'"),
    "length": (
        {"settings": {"run.extend": True}, "cells": {"a": {}}},
        "cell a: run.extend must be false in a grid; give the new length and another --out",
    ),
    "weights that run live": (
        {
            "settings": {"teachers.cache": "none"},
            "cells": {"a": {"teachers": "x=file:/nowhere#arch=vit_tiny_patch16_224"}},
        },
        "cell a: teacher 'x' has no weights at '/nowhere'",
    ),
    "weights": (
        {"cells": {"a": {"teachers": "x=file:/nowhere#arch=vit_tiny_patch16_224"}}},
        "cell a: teacher 'x' has no weights at '/nowhere'",
    ),
}


@DEMONSTRATION
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, sentence = MISTAKES[case]
    word = "componets" if case == "no grid" else str(tmp_path / "grid.yaml")
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(given))
    words = ["ablate", word, "--out", str(tmp_path / "out")]
    assert entry_point.run(cli.dispatch, words) == 2
    said = capsys.readouterr().err
    assert said.startswith("unic_ds: error: ") and said.count("\n") == 1 and sentence in said
    assert not (tmp_path / "out").exists()


def test_a_large_grid_is_counted_and_not_built(capsys: pytest.CaptureFixture[str]) -> None:
    values = ",".join(map(str, range(1, 101)))
    axes = [f"{name}={values}" for name in ("optim.lr", "drop.full_every")]
    begun = time.process_time()
    assert entry_point.run(cli.dispatch, ["ablate", *axes]) == 2
    assert "10,000 cells x 3 seeds are 30,000 runs; add --yes true" in capsys.readouterr().err
    more = [*axes, f"optim.epochs={values}", "--yes", "true"]
    assert entry_point.run(cli.dispatch, ["ablate", *more]) == 2
    assert "3,000,000 runs, more than 100,000" in capsys.readouterr().err
    assert time.process_time() - begun < 10


@DEMONSTRATION
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_of_legal_settings(name: str, tmp_path: Path) -> None:
    study = Study(grid=grid.read([name], {}), out=tmp_path / "out")
    check_cells(study)
    assert len(study.cells) > 1 and not (tmp_path / "out").exists()


def study_of(cells: dict[str, Any], tmp_path: Path, **settings: str) -> Study:
    """A grid of the quickstart."""
    found = grid.parse({"cells": cells}, name="x", settings=settings)
    return Study(grid=found, out=tmp_path / "out")


def test_teachers_of_a_cell_keep_their_settings(tmp_path: Path) -> None:
    cells = {"all": {}, "one": {"teachers": "dinov2"}, "more": {"teachers": "a=timm:x,effnet"}}
    study = study_of(cells, tmp_path, **{"teachers.dinov2.size": "42"})
    (row,) = study.config("one", 5).teachers
    assert (row.name, row.size, row.block) == ("dinov2", 42, "10")
    assert [row.name for row in study.config("more", 0).teachers] == ["a", "effnet"]
    assert study.config("one", 5).seed == 5 and not study.config("one", 5).eval.on


def test_cells_share_features_if_teachers_and_images_agree(tmp_path: Path) -> None:
    cells = {
        "all": {},
        "lr": {"optim.lr": "1"},
        "one": {"teachers": "dinov2"},
        "crop": {"data.crop_min": "0.5"},
        "size": {"student.size": "64"},
        "block": {"teachers.dinov2.block": "3"},
        "drawn": {"data.sizes": "96,112"},
        "shift": {"loss.shift": "1"},
        "follows": {"data.sizes": "96,112", "teachers.dinov2.size": "0"},
        "live": {"teachers.cache": "none"},
    }
    study = study_of(cells, tmp_path)
    configs = {name: study.config(name, 0) for name in cells}
    live = {name for name, cfg in configs.items() if live_reason(study, name, cfg)}
    assert live == {"shift", "follows", "live"}
    folders = {n: features_of(study, cfg).folder for n, cfg in configs.items() if n not in live}
    shared = {name for name, found in folders.items() if found == folders["all"]}
    assert shared == {"all", "lr", "one", "drawn"} and len(set(folders.values())) == 4
    assert features_of(study, study.config("all", 1)).folder != folders["all"]
    assert [row.name for row in features_of(study, configs["one"]).cfg.teachers] == [
        "effnet",
        "dinov2",
    ]


@DEMONSTRATION
def test_all_cells_may_run_live(tmp_path: Path) -> None:
    found = grid.read(["loss.shift=0,1"], {"teachers.cache": "none"})
    study = Study(grid=found, out=tmp_path / "out")
    check_cells(study)
    assert all(study.live(cell) and not study.config(cell, 0).cache for cell in study.cells)


def begun(study: Study, cell: str, cache: str = "") -> Path:
    """The folder of a run of a cell, as its start leaves it."""
    run = study.run(cell, 0)
    run.folder.mkdir(parents=True)
    reuse.record(study, run)
    plain = overrides.to_dict(study.config(cell, 0)) | {"cache": cache}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    return run.folder


OTHERS: dict[str, tuple[dict[str, str], str]] = {
    "images": ({"data.train": "/other"}, r"data\.train was .*, now '/other'"),
    "validation images": ({"data.val": "/o", "data.val_share": "0"}, r"data\.val was '', now '/o'"),
    "weights": ({"student.init": "/x"}, r"student\.init was '', now '/x'"),
    "live": ({"teachers.cache": "none"}, "views was '1', now 'live'"),
}


@DEMONSTRATION
@pytest.mark.parametrize("case", OTHERS)
def test_a_run_of_other_inputs_is_not_reused(case: str, tmp_path: Path) -> None:
    folder = begun(study_of({"a": {}}, tmp_path), "a", cache="/elsewhere/features/x")
    settings, sentence = OTHERS[case]
    other = study_of({"a": {}}, tmp_path, **settings)
    with pytest.raises(ValueError, match=f"{sentence}.*choose another --out") as error:
        reuse.check(other, other.run("a", 0))
    assert str(folder) in str(error.value)


@DEMONSTRATION
def test_views_and_ds_config_are_compared_and_speed_is_not(tmp_path: Path) -> None:
    study = study_of({"a": {}}, tmp_path)
    begun(study, "a", cache="/elsewhere/features/x")
    faster = {"data.threads": "3", "teachers.dinov2.micro": "2", "run.save_every": "7"}
    check_cells(study_of({"a": {}}, tmp_path, **faster))
    for changed, differs in (
        (replace(study, views=2), "views was '1', now '2'"),
        (
            replace(study, ds_config=str(ROOT / "ds_configs" / "zero1.json")),
            r"ds_config\.zero_optimization\.stage was '2', now '1'",
        ),
    ):
        with pytest.raises(ValueError, match=f"cell a: .*{differs}"):
            check_cells(changed)
    (study.folder("a", 0) / reuse.FILE).unlink()  # as `unic-ds train` leaves it
    check_cells(replace(study, views=2))


def test_a_copy_of_a_grid_is_the_grid(tmp_path: Path) -> None:
    found = grid.read(["teachers"], {"data.sizes": "", "optim.lr": "1e-3"}, seeds="3,5")
    axes = grid.read(["drop.rate=0,0.5", "ladder.rungs=last;5,11"], {})
    for each in (found, axes):
        copy = job_array.write_copy(Study(grid=each, out=tmp_path))
        assert replace(grid.read([str(copy)], {}), name=each.name) == each
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_is_found_by_its_number(tmp_path: Path) -> None:
    study = study_of({"a": {}, "b": {"optim.lr": "1"}}, tmp_path)
    assert [ablate.find_run(study, i) for i in range(study.grid.runs)] == list(study.runs())


def test_the_folder_of_a_home_is_expanded() -> None:
    assert folder_of("~/grid") == Path.home() / "grid"
    with pytest.raises(ValueError, match="in the home of no user"):
        folder_of("~nobody-of-that-name/grid")


def test_images_of_training_and_evaluation_are_compared(tmp_path: Path) -> None:
    for name in ("a/val", "b"):
        (tmp_path / name).mkdir(parents=True)
    settings = {"data.train": str(tmp_path / "a"), "data.val_share": "0"}
    for val, shared in (("a/val", True), ("b", False)):
        given = settings | {"data.val": str(tmp_path / val)}
        found = shared_images(study_of({"a": {}}, tmp_path, **given).base)
        assert found == ([str(tmp_path / val)] if shared else [])
