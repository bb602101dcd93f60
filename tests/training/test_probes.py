"""Probes measure the student during training, and change nothing of it."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from pictures import folder
from runs import TRAIN, curve, kill_on_the_way, run, tiny, together

from unic_ds import config
from unic_ds.config import Config, Data
from unic_ds.config.evaluation import Probe
from unic_ds.config.schedule import Run
from unic_ds.evaluate import comparison
from unic_ds.harness.image_sets import find_images
from unic_ds.training import checkpoint, probes
from unic_ds.training.run_log import RunLog

BY = "probe/teacher wide patch smooth-l1"
PROBED = {
    "optim.steps": 4,
    "optim.lr": "1e-2",
    "run.save_every": 0,
    "probe.every": 2,
    "run.keep_best": 1,
    "run.best_by": BY,
    "run.keep_last": 1,
    "probe.pictures": 2,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 training and 13 validation images of two classes."""
    root = tmp_path_factory.mktemp("probes")
    folder(root / "train", 24)
    folder(root / "val", 13)
    return root


def training(out: Path) -> dict[int, dict[str, Any]]:
    """The curve without probes."""
    return {
        step: {key: x for key, x in row.items() if not key.startswith("probe")}
        for step, row in curve(out).items()
    }


def probed(out: Path) -> dict[int, dict[str, float]]:
    """Step -> values of a probe."""
    rows = {
        step: {key: x for key, x in row.items() if key.startswith("probe/")}
        for step, row in curve(out).items()
    }
    return {step: row for step, row in rows.items() if row}


@pytest.mark.dist
def test_two_ranks_train_the_same_with_probes_under_every_stage(images: Path) -> None:
    """The average of the weights is measured, and is what is exported after the last step."""
    plan, words = images / "plan.json", []
    for stage in (1, 3):
        base = {"ds_config": f"ds_configs/zero{stage}.json", "optim.ema": 0.5}
        plain = base | {"optim.steps": 4, "optim.lr": "1e-2", "eval.on": "false"}
        words.append(tiny(images, f"plain{stage}", plain))
        evaluated = {"eval.on": str(stage == 1).lower(), "eval.tasks": "knn,teacher"}
        words.append(tiny(images, f"probed{stage}", base | PROBED | evaluated))
    plan.write_text(json.dumps(words))
    printed = run(together(plan))
    assert printed.count("probe in ") == 4 and "s: knn " in printed
    for stage in (1, 3):
        assert training(images / f"probed{stage}") == training(images / f"plain{stage}")
        found = probed(images / f"probed{stage}")
        assert found.keys() == {2, 4} and found[2].keys() == found[4].keys()
        assert {"probe/knn", "probe/knn/wide", "probe/rankme", "probe/rankme/narrow", BY} <= found[
            2
        ].keys()
        assert found[2][BY] != found[4][BY]
    first, third = (probed(images / f"probed{stage}") for stage in (1, 3))
    table = comparison.read(images / "probed1").by_model()
    assert first[4]["probe/knn"] == pytest.approx(table["student after"]["knn"])
    assert first[4]["probe/knn/wide"] == pytest.approx(table["wide"]["knn"])
    exported = table["student after"][BY.removeprefix("probe/")]
    assert first[4][BY] == pytest.approx(exported, rel=1e-5)
    assert first[4] == pytest.approx(third[4], rel=1e-4, abs=1e-4)
    check_kept(images / "probed1", first)


def check_kept(out: Path, values: dict[int, dict[str, float]]) -> None:
    """Check that the checkpoints are the newest and that of the lowest `BY`, with its value."""
    best = min(values, key=lambda step: values[step][BY])
    kept = {path.name for path in (out / "checkpoints").glob("step_*")}
    assert kept == {f"step_{best:07d}", "step_0000004"}
    facts = json.loads((out / "checkpoints" / f"step_{best:07d}" / checkpoint.FACTS).read_text())
    assert facts["probe"][BY]["value"] == pytest.approx(values[best][BY])
    assert facts["probe"][BY]["better"] == "lower"


def test_a_killed_run_probes_at_the_same_steps(images: Path) -> None:
    """One process; the probes are of a folder of their own, of which they see a part.

    They lack the value of best_by, which is said once and ends nothing.
    """
    random.seed(os.environ.get("PYTEST_SEED"))
    folder(images / "own", 40)
    words = PROBED | {
        "optim.steps": 8,
        "run.save_every": 1,
        "eval.on": "false",
        "probe.tasks": "teacher,knn",
        "run.best_by": f"{BY} of no teacher",
        "probe.data": images / "own",
        "probe.images": 12,
    }
    whole, killed = (Forked(1, [TRAIN, *tiny(images, o, words)]) for o in ("whole", "killed"))
    printed = run(whole)
    assert printed.count("of no teacher' is not measured, so no checkpoint is kept as one") == 1
    kill_on_the_way(killed, images / "killed", last=7)
    run(killed)
    assert curve(images / "killed") == curve(images / "whole")
    assert probed(images / "killed").keys() == {2, 4, 6, 8}
    folders = [images / out / "pictures" for out in ("killed", "whole")]
    ours, theirs = (json.loads((path / "pictures.json").read_text()) for path in folders)
    assert ours == theirs
    assert {(row["step"], row["kind"]) for row in ours} >= {(2, "neighbours"), (8, "pca")}
    for row in ours:
        if row["kind"] != "pca":  # the student's signs may follow a picture after the kill
            assert len({(path / row["file"]).read_bytes() for path in folders}) == 1


@pytest.mark.gpu
def test_compiled_deterministic_kernels_train_the_same_with_probes(images: Path) -> None:
    base = {"optim.steps": 4, "precision": "bf16", "eval.on": "false", "run.compile": "all"}
    base |= {"run.deterministic": "true"}
    more = {"probe.every": 1, "run.save_every": 0}
    for name, words in (("off", base), ("on", base | more)):
        run(Forked(1, [TRAIN, *tiny(images, name, words)]))
    assert training(images / "on") == training(images / "off")


def settings(root: Path, *, val: str = "", **more: Any) -> Config:
    """Settings of a run on those images, with probes."""
    data = Data(train=str(root / "train"), val=val)
    return Config(data=data, probe=Probe(every=2, **more))


def test_probes_without_images_or_labels_are_refused(images: Path, tmp_path: Path) -> None:
    for side in ("train", "val"):
        folder(tmp_path / side, 4, classes=1)
    one_class = settings(tmp_path, val=str(tmp_path / "val"))
    for cfg, says in (
        (settings(images), "--probe.every needs validation images: give --data.val DIR"),
        (one_class, "the probe knn needs labels: it needs class folders, two or more"),
        (settings(images, data=str(tmp_path)), "has 1 class folders with training images"),
        (settings(images, data=str(tmp_path / "no")), "no"),
    ):
        with pytest.raises(ValueError, match=says):
            probes.check(cfg, *find_images(cfg))
    teacher = settings(tmp_path, val=str(tmp_path / "val"), tasks=("teacher",))
    probes.check(teacher, *find_images(teacher))
    off = Config(data=Data(train=str(images / "train")))
    probes.check(off, *find_images(off))


def test_the_sample_is_the_same_at_every_start(images: Path) -> None:
    cfg = settings(images, val=str(images / "val"), images=7)
    once, again = (probes.open_sets(cfg, *find_images(cfg)) for _ in range(2))
    for name in ("train", "val"):
        assert len(once[name]) == 7
        names = [[found[name].file_name(i) for i in range(7)] for found in (once, again)]
        assert names[0] == names[1]


def test_options_that_do_not_fit_are_refused() -> None:
    on = Probe(every=10, tasks=("knn",))
    Config(probe=on, run=Run(best_by="probe/knn"))
    for section, by, says in (
        (on, "probe/linear", "run.best_by must be loss or, with --probe.every, a value of probe"),
        (on, "accuracy", "run.best_by must be loss"),
        (Probe(), "probe/knn", "run.best_by must be loss or, with --probe.every"),
        (Probe(tasks=("depth",)), "loss", "probe.tasks must be of knn, linear"),
    ):
        with pytest.raises(ValueError, match=says):
            Config(probe=section, run=Run(best_by=by))
    for more in ({"every": -1}, {"images": 0}, {"tasks": ()}):
        with pytest.raises(ValueError, match="probe"):
            Probe(**more)


def test_a_value_that_knn_lacks_is_refused_at_the_start(images: Path) -> None:
    def check(by: str, keep: int = 1, **knn: Any) -> None:
        cfg = settings(images, val=str(images / "val"))
        cfg = replace(cfg, run=Run(keep_best=keep, best_by=by), eval=config.Eval(**knn))
        probes.check(cfg, *find_images(cfg))

    check("probe/knn")
    check("probe/knn", k=(7, 7))
    check("probe/knn k=20", protocol="dinov2")
    check("probe/knn k=5", k=(5, 10))
    check("probe/knn", keep=0, k=(5, 10))
    with pytest.raises(ValueError, match=r"of probe/knn k=5, probe/knn k=10, .* got 'probe/knn'"):
        check("probe/knn", k=(5, 10))
    with pytest.raises(ValueError, match=r"one of probe/knn, by eval.k .* got 'probe/knn k=10'"):
        check("probe/knn k=10")


def test_a_student_to_copy_to_leaves_random_states() -> None:
    cfg = Config(student=config.Student(model="test_vit", size=32))
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    student = probes.empty_student(cfg, {})
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numbers).all()  # type: ignore[index]
    assert not any(p.requires_grad for p in student.parameters()) and not student.training


def test_seconds_of_a_probe_do_not_count_as_training(tmp_path: Path) -> None:
    with RunLog(tmp_path, steps=9, first=1, batch_size=8, flops_per_image=1.0) as log:
        for step in (1, 2):
            log.add({"loss": torch.tensor(0.5)})
            if step == 1:
                log.logged_time -= 100.5  # a probe of 100 s, and training
                log.add_probe({"probe/knn": 70.0}, shown="knn 70%", seconds=100.0)
            log.write(step, waited_s=0.0, bad=0, reason_K=torch.zeros(1))
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["probe/knn"] == 70 and first["probe_s"] == 100
    assert 8 < first["images_per_s"] <= 16
    assert "probe/knn" not in second
