"""A real grid is trained, tried again after a failure, evaluated once a seed, and written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Forked
from pictures import folder
from PIL import Image
from runs import ROOT, TINY, start

from unic_ds.ablation import ablate, evaluations, grid, results, run_cells
from unic_ds.ablation.cells import Study
from unic_ds.ablation.checks import check_cells

MAIN = str(ROOT / "unic_ds" / "cli" / "__main__.py")
BROKEN = "python:nowhere:build"
pytestmark = pytest.mark.slow


class Starter:
    """Runs verbs as `child.start` does, in ranks that are forked; keeps their words."""

    def __init__(self) -> None:
        self.words: list[Sequence[str]] = []

    def __call__(self, words: Sequence[str], ranks: int, log: Path) -> int:
        self.words.append(words)
        process = start(Forked(ranks, [MAIN, *words]))
        output, _ = process.communicate()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output)
        return process.returncode

    def trained(self) -> list[str]:
        """CELL/seedN of each training."""
        found = [words[words.index("--out") + 1] for words in self.words if words[0] == "train"]
        return ["/".join(Path(out).parts[-2:]) for out in found]

    def count(self, verb: str) -> int:
        """Starts of a verb."""
        return sum(words[0] == verb for words in self.words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A grid of three cells, of which one fails: with one seed first, then with two."""
    root = tmp_path_factory.mktemp("ablate")
    for side in ("train", "val"):
        folder(root / side, 17)
    settings = {key: value for key, value in TINY.items() if key not in ("ds_config", "recipe")}
    settings |= {f"data.{side}": str(root / side) for side in ("train", "val")}
    settings |= {"optim.steps": 2, "run.save_every": 0}
    broken = {"teachers": BROKEN, "teachers.cache": "none"}
    plain = {
        "recipe": "unic_b",
        "settings": settings,
        "cells": {"plain": {}, "fast": {"optim": {"lr": 0.01}}, "broken": broken},
        "seeds": [0, 1],
        "tasks": "knn",
    }
    (root / "grid.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    study: Study | None = None
    starters, codes = [], []
    for seeds in ("0", ""):
        found = grid.read([str(root / "grid.yaml")], {}, seeds=seeds)
        study = Study(grid=found, out=root / "out")
        check_cells(study)
        starters.append(Starter())
        codes.append(ablate.train_and_evaluate(study, starters[-1]))
    return {"study": study, "first": starters[0], "again": starters[1], "codes": codes}


@pytest.fixture
def written(made: dict[str, Any]) -> dict[str, Any]:
    """ablation.json."""
    return json.loads((made["study"].out / "ablation.json").read_text())


def test_a_failed_run_is_tried_again_and_no_other(made: dict[str, Any]) -> None:
    one, two = ([f"{cell}/seed{seed}" for cell in ("plain", "fast", "broken")] for seed in (0, 1))
    assert made["codes"] == [1, 1]
    assert made["first"].trained() == one
    assert made["again"].trained() == ["broken/seed0", *two]
    for starter in (made["first"], made["again"]):
        assert starter.count("eval") == 1  # of the new seed alone
        assert starter.count("cache") == 1  # for both cells that have one
    for cell in ("plain", "fast"):
        settings = yaml.safe_load((made["study"].out / cell / "seed1" / "config.yaml").read_text())
        assert settings["seed"] == 1 and Path(settings["cache"]).is_dir()


def test_json_has_the_statistics_of_the_evaluations(
    made: dict[str, Any], written: dict[str, Any]
) -> None:
    (knn,) = (row for row in written["measures"] if row["name"] == "knn")
    tables = [
        json.loads((made["study"].out / "eval" / f"seed{seed}" / "evaluation.json").read_text())
        for seed in (0, 1)
    ]
    values = [next(r["values"] for r in each["rows"] if r["name"] == "knn") for each in tables]
    assert all(found.keys() == {"plain", "fast", "narrow", "wide"} for found in values)
    for cell in ("plain", "fast"):
        low, high = (found[cell] for found in values)
        row = knn["cells"][cell]
        assert row["values"] == {"0": low, "1": high}
        assert row["mean"] == pytest.approx((low + high) / 2)
        assert row["std"] == pytest.approx(abs(low - high) / math.sqrt(2))
        gains = [found[cell] - max(found["narrow"], found["wide"]) for found in values]
        assert row["minus_best_teacher"]["mean"] == pytest.approx(sum(gains) / 2)
    gaps = [found["fast"] - found["plain"] for found in values]
    assert knn["cells"]["fast"]["minus_compared"] == {
        "mean": pytest.approx(sum(gaps) / 2),
        "std": pytest.approx(abs(gaps[0] - gaps[1]) / math.sqrt(2)),
        "seeds": 2,
    }
    assert knn["cells"]["plain"]["minus_compared"] is None
    assert knn["protocols"] and all("knn k=3" in text for text in knn["protocols"])
    assert written["cells"]["broken"]["seeds"] == []
    assert [(row["cell"], row["seed"]) for row in written["unfinished"]] == [
        ("broken", 0),
        ("broken", 1),
    ]
    for row in written["unfinished"]:
        assert "cannot import 'nowhere'" in row["error"] and Path(row["log"]).is_file()


def test_table_page_and_picture_show_what_the_json_has(
    made: dict[str, Any], written: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = made["study"].out
    ablate.show_results(results.collect(made["study"]))
    printed, page = capsys.readouterr().out, Page((out / "ablation.html").read_text())
    text = (out / "ablation.md").read_text()
    for measure in written["measures"]:
        for cell in measure["cells"].values():
            shown = f"{cell['mean']:.1f} +- {cell['std']:.1f}"
            assert shown in printed and shown in page.text and shown in text
    assert "without a student: broken, seed 0: " in printed and "optim.lr" in page.text
    sources = [row["src"] for tag, row in page.elements if tag == "img"]
    assert sources and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert [row.get("data-chart") for tag, row in page.elements if tag == "figure"] == [None, "0"]
    with Image.open(out / "ablation.png") as image:
        assert min(image.size) > 100


class Page(HTMLParser):
    """Elements of a page, and its text without scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = ""
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.texts.append(data)


def test_a_run_of_a_number_is_trained_once(made: dict[str, Any]) -> None:
    starter = Starter()
    assert ablate.train_only(made["study"], 4, starter) == 0 and not starter.words
    with pytest.raises(ValueError, match=r"--only must be from 0 to 5, got 6"):
        ablate.train_only(made["study"], 6, starter)
    assert ablate.collect(made["study"], starter) == 1 and not starter.words


def test_an_evaluation_of_other_tasks_is_not_taken(made: dict[str, Any]) -> None:
    study = made["study"]
    other = replace(study, grid=replace(study.grid, tasks="linear"))
    assert results.collect(other).not_evaluated == [0, 1] and not results.collect(other).measures
    weights = study.folder("plain", 1) / "student" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    os.utime(weights, ns=(before, before + 1))  # as if it was trained again
    try:
        found = results.collect(study)
        assert found.not_evaluated == [1] and found.seeds_of("plain") == [0]
    finally:
        os.utime(weights, ns=(before, before))
    assert evaluations.up_to_date(study, 1)


def test_features_of_other_images_are_named(made: dict[str, Any], tmp_path: Path) -> None:
    """The images changed under their path: the stored features are of others."""
    study = made["study"]
    trainer, run = run_cells.Trainer(study, Starter()), study.run("plain", 1)
    added = study.out.parent / "train" / "a" / "new.png"
    added.parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40)).save(added)
    try:
        with pytest.raises(
            ValueError, match=r"cannot be used \(.*holds a feature cache with other"
        ):
            trainer.cache_of(study.config("plain", 1), run)
    finally:
        added.unlink()


def test_a_folder_of_other_settings_is_refused(made: dict[str, Any]) -> None:
    found = grid.read([str(made["study"].out.parent / "grid.yaml")], {"optim.lr": "0.5"})
    with pytest.raises(ValueError, match=r"cell plain: .*optim\.lr was .* choose another --out"):
        check_cells(Study(grid=found, out=made["study"].out))
