"""A run's log at TensorBoard, W&B and MLflow, read back by their own readers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb_records
from forked import Forked
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray
from pictures import folder
from runs import TRAIN, curve, run, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unic_ds import config
from unic_ds.files import run_files
from unic_ds.training import trackers
from unic_ds.training.run_log import RunLog
from unic_ds.training.trackers.groups import group_of
from unic_ds.training.trackers.queued import WAITING, Queued
from unic_ds.training.trackers.record_ids import read_ids, read_steps
from unic_ds.training.trackers.tracker import End, Row, Start

BASE = {"eval.on": "false", "optim.steps": 4, "run.track": "wandb,mlflow"}


def start(images: Path, out: str, **more: object) -> str:
    """Run a tiny student; what is printed."""
    words = {key.replace("__", "."): value for key, value in more.items()}
    return run(Forked(1, [TRAIN, *tiny(images, out, BASE | words)]))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 training images of two classes."""
    root = tmp_path_factory.mktemp("tracked")
    folder(root / "train", 24)
    folder(root / "val", 13)
    return root


@pytest.fixture(scope="module")
def tracked(images: Path) -> Iterator[Path]:
    """A run that has logged three of four steps, and was resumed after two of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the reader
        out = images / "run"
        start(images, "run", run__stop_at=3)
        shutil.rmtree(out / "checkpoints" / "step_0000003")
        (out / "checkpoints" / "latest").write_text("step_0000002")
        assert "resumed after step 2" in start(images, "run")
        yield out


def expected(out: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value of log.jsonl."""
    found: dict[str, dict[int, float]] = {}
    for step, row in curve(out).items():
        for name, value in row.items():
            if name != "step" and value is not None:
                found.setdefault(group_of(name), {})[step] = value
    return found


def assert_same(found: dict[str, dict[int, float]], out: Path) -> None:
    """Check that a service has each value of log.jsonl that time does not touch."""
    for tag, values in expected(out).items():
        assert found[tag] == pytest.approx(values, rel=1e-5), tag


def test_tensorboard_has_the_log_in_groups_and_each_step_once(tracked: Path) -> None:
    board = EventAccumulator(str(tracked / "tb"), size_guidance={"histograms": 0, "scalars": 0})
    board.Reload()
    points = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"]}
    found = {tag: {point.step: point.value for point in row} for tag, row in points.items()}
    assert [point.step for point in points["loss/loss"]] == [1, 2, 3, 4]
    assert_same(found, tracked)
    for teacher in ("narrow", "wide"):
        histograms = board.Histograms(f"teachers/{teacher}/image_loss")
        assert [point.step for point in histograms] == [1, 2, 3, 4]
        assert all(point.histogram_value.num == 8 for point in histograms)


def test_wandb_has_one_record_with_each_step_once_and_nothing_of_the_machine(tracked: Path) -> None:
    first, second = sorted((tracked / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name == f"run-{read_ids(tracked)['wandb']}.wandb"
    starts = [wandb_records.rows(file) for file in (first, second)]
    assert [[row["_step"] for row in rows] for rows in starts] == [[1, 2, 3], [4]]
    rows = {row["_step"]: row for rows in starts for row in rows}
    found: dict[str, dict[int, Any]] = {}
    for step, row in rows.items():
        for tag, value in row.items():
            found.setdefault(tag, {})[step] = value
    assert_same(found, tracked)
    assert sum(rows[4]["teachers/wide/image_loss/values"]) == 8
    records = [r for file in (first, second) for r in wandb_records.records(file)]
    kinds = {record.WhichOneof("record_type") for record in records}
    assert not kinds & {"environment", "files", "output", "output_raw", "stats"}
    runs = [record.run for record in records if record.HasField("run")]
    assert {(r.project, r.display_name, r.host) for r in runs} == {("unic_ds", "run", "")}
    settings = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert settings["optim"]["steps"] == 4
    assert [exit_codes(file) for file in (first, second)] == [[0], [0]]
    assert read_steps(tracked) == {"wandb": 4}


def test_mlflow_has_one_run_with_each_step_once(tracked: Path) -> None:
    client = MlflowClient((tracked / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("unic_ds")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == read_ids(tracked)["mlflow"]
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["optim.steps"] == "4"
    history = {
        tag: [
            (point.step, point.value) for point in client.get_metric_history(found.info.run_id, tag)
        ]
        for tag in found.data.metrics
    }
    assert [step for step, _ in history["loss/loss"]] == [1, 2, 3, 4]
    assert_same({tag: dict(points) for tag, points in history.items()}, tracked)
    low, middle, high = (history[f"teachers/wide/image_loss_p{q}"][0][1] for q in (10, 50, 90))
    assert low < middle < high


def test_each_name_of_the_log_has_a_group_and_shares_add_up(tracked: Path) -> None:
    rows = [json.loads(line) for line in (tracked / "log.jsonl").read_text().splitlines()]
    tags = [group_of(name) for name in rows[0] if name != "step"]
    assert len(set(tags)) == len(tags)
    groups = {"loss", "teachers", "optimisation", "throughput"}
    assert {tag.split("/")[0] for tag in tags} == groups
    assert group_of("probe/knn k=5") == "probes/knn k=5/student"
    assert group_of("probe/knn/dinov2") == "probes/knn/dinov2"
    for row in rows:
        assert not any("image_loss" in name for name in row)
        assert row["narrow/loss_share"] + row["wide/loss_share"] == pytest.approx(1, abs=1e-6)


def test_a_run_goes_on_without_trackers_that_fail(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B has no key, MLflow's server refuses, and TensorBoard's folder is a file."""
    (images / "failing").mkdir()
    (images / "failing" / "tb").touch()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(images / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(images))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    printed = start(images, "failing", optim__steps=2)
    assert "finished" in printed and len(curve(images / "failing")) == 2
    lines = (images / "failing" / run_files.EVENTS).read_text().splitlines()
    failed = {row["tracker"]: row for row in map(json.loads, lines)}
    assert len(lines) == 3 and {row["event"] for row in failed.values()} == {"tracker failed"}
    assert "no API key" in failed["wandb"]["error"]
    assert "127.0.0.1" in failed["mlflow"]["error"]
    assert "File exists" in failed["tensorboard"]["error"]
    for name, row in failed.items():
        assert printed.count(f"{name} failed and is switched off") == 1
        assert row["remedy"] in printed


class Stuck:
    """A tracker that waits for a network until it is released."""

    def __init__(self) -> None:
        self.called, self.released = threading.Event(), threading.Event()

    def scalars(self, row: Row, *, step: int) -> None:
        self.called.set()
        self.released.wait()

    def histogram(self, name: str, value_N: NDArray[np.floating], *, step: int) -> None: ...

    def picture(
        self, name: str, image_HW3: NDArray[np.uint8], *, caption: str, step: int
    ) -> None: ...

    def text(self, name: str, text: str, *, step: int) -> None: ...

    def close(self, end: End) -> None: ...


def test_training_does_not_wait_for_a_service(tmp_path: Path) -> None:
    stuck, reports = Stuck(), list[tuple[str, str]]()
    queued = Queued(lambda: stuck, close_s=0.2)
    log = trackers.Trackers(
        trackers.JsonLines(tmp_path / "log.jsonl", []),
        {"wandb": lambda: queued},
        report=lambda name, error, _: reports.append((name, str(error))),
    )
    log.each(lambda tracker: tracker.scalars({"loss": 0.5}, step=1))
    assert stuck.called.wait(30)
    log.close("finished")
    assert reports == [("wandb", "it has not taken the last lines within 0.2 s")]
    stuck.released.set()


def test_services_have_their_seconds_at_the_end_at_the_same_time(tmp_path: Path) -> None:
    stuck, late = [Stuck(), Stuck()], list[str]()
    first, second = (Queued(lambda one=one: one, close_s=1.0) for one in stuck)
    log = trackers.Trackers(
        trackers.JsonLines(tmp_path / "log.jsonl", []),
        {"wandb": lambda: first, "mlflow": lambda: second},
        report=lambda name, *_: late.append(name),
    )
    log.each(lambda tracker: tracker.scalars({"loss": 0.5}, step=1))
    begun = time.monotonic()
    log.close("finished")
    assert 1.0 <= time.monotonic() - begun < 1.9 and late == ["wandb", "mlflow"]
    for one in stuck:
        one.released.set()


def log_steps(out: Path, first: int, last: int, *services: str, error: Exception | None) -> None:
    """A start that logs steps of six and ends, by an exception if there is one."""
    cfg = config.Config(run=config.Run(track=services))
    facts = {"steps": 6, "batch_size": 8, "flops_per_image": 1.0, "stops": (KeyError,)}
    with RunLog(out, first=first, cfg=cfg, **facts) as log:
        for step in range(first, last + 1):
            log.add({"loss": torch.tensor(0.5)})
            log.write(step, waited_s=0.0, bad=0, reason_K=torch.zeros(1))
        if error:
            raise error


def test_mlflow_has_each_step_once_after_any_starts_and_the_end_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start truncates the log, so that it does not tell what a service has."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    starts: list[tuple[int, int, Exception | None, str]] = [
        (1, 4, ArithmeticError(), "FAILED"),
        (2, 3, KeyError(), "KILLED"),
        (2, 5, None, "KILLED"),
        (2, 6, None, "FINISHED"),
    ]
    for first, last, error, status in starts:
        with pytest.raises(type(error)) if error else nullcontext():
            log_steps(tmp_path, first, last, "mlflow", error=error)
        run_id = read_ids(tmp_path)["mlflow"]
        assert client.get_run(run_id).info.status == status
    points = client.get_metric_history(run_id, "loss/loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]


def exit_codes(file: Path) -> list[int]:
    """The exit codes in a file of W&B."""
    found = wandb_records.records(file)
    return [record.exit.exit_code for record in found if record.HasField("exit")]


def test_wandb_has_the_steps_that_another_start_logged_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ArithmeticError):
        log_steps(tmp_path, 1, 2, "wandb", error=ArithmeticError())
    log_steps(tmp_path, 3, 5, error=None)
    log_steps(tmp_path, 2, 6, "wandb", error=None)
    found = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    files = sorted(found, key=lambda file: file.stat().st_mtime)
    deadline = time.monotonic() + 30  # W&B's process writes the last of a file when it likes
    while not all(exit_codes(file) for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    steps = [[row["_step"] for row in wandb_records.rows(file)] for file in files]
    assert steps == [[1, 2], [3, 4, 5, 6]]
    assert [exit_codes(file) for file in files] == [[1], [0]]


def test_a_log_that_loses_no_line_is_not_written_again(tmp_path: Path) -> None:
    """A full disk could not take it."""
    file = tmp_path / "log.jsonl"
    log_steps(tmp_path, 1, 2, error=None)
    before = file.stat().st_ino
    log_steps(tmp_path, 3, 4, error=None)
    assert file.stat().st_ino == before and len(file.read_text().splitlines()) == 4
    file.write_text(file.read_text()[:-1])  # killed between a line and its end
    log_steps(tmp_path, 5, 5, error=None)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_service_that_falls_behind_is_switched_off(tmp_path: Path) -> None:
    stuck, reports = Stuck(), list[str]()
    log = trackers.Trackers(
        trackers.JsonLines(tmp_path / "log.jsonl", []),
        {"mlflow": lambda: Queued(lambda: stuck)},
        report=lambda name, error, _: reports.append(f"{name} {error}"),
    )
    for _ in range(WAITING + 10):
        log.each(lambda tracker: tracker.scalars({"loss": 0.5}, step=1))
    log.close("finished")
    assert reports == [f"mlflow {WAITING} calls behind"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == WAITING + 10
    stuck.released.set()


ENDING = """
import atexit, subprocess, sys
from unic_ds.training.trackers.queued import WAITING, Queued

def open_tracker():
    process = subprocess.Popen(sys.argv[1], stdin=subprocess.PIPE)
    atexit.register(process.wait)
    print("started", flush=True)
    process.wait()

queued = Queued(open_tracker, program="stuck-service", close_s=1.0)
try:
    queued.close("finished")
except TimeoutError:
    print("late")
"""
"""A process whose tracker starts another, for which it would wait at its end."""


def test_the_end_of_a_process_does_not_wait_for_that_of_a_service(tmp_path: Path) -> None:
    program = tmp_path / "stuck-service"
    program.write_text("#!/bin/sh\nread line\n")
    program.chmod(0o755)
    words = [sys.executable, "-c", ENDING, str(program)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert (sorted(done.stdout.split()), done.stderr) == (["late", "started"], "")


def test_pictures_and_texts_reach_tensorboard_escaped(tmp_path: Path) -> None:
    image_HW3 = np.full((4, 6, 3), 255, np.uint8)
    with RunLog(tmp_path, steps=9, first=1, batch_size=8, flops_per_image=1.0) as log:
        log.picture("pictures/pca", image_HW3, "of <b>8</b> images", 1)
        log.text("broken images", "<script>", 1)
        log.add({"loss": torch.tensor(0.5), "t/image_loss": torch.tensor([0.1, torch.nan])})
        log.write(1, waited_s=0.0, bad=0, reason_K=torch.zeros(1))
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    (found,) = board.Images("pictures/pca")
    assert (found.step, found.width, found.height) == (1, 6, 4)
    (text,) = board.Tensors("broken images/text_summary")
    assert text.tensor_proto.string_val == [b"<pre>&lt;script&gt;</pre>"]
    (histogram,) = board.Histograms("teachers/t/image_loss")
    assert histogram.histogram_value.num == 1
    assert json.loads((tmp_path / "log.jsonl").read_text()).keys() >= {"step", "loss"}


def test_a_stage_is_named_after_its_run(tmp_path: Path) -> None:
    names = {
        folder: Start(folder=tmp_path / folder, cfg=config.Config()).name
        for folder in ("x", "x/stage2", "x/stages")
    }
    assert names == {"x": "x", "x/stage2": "x/stage2", "x/stages": "stages"}


@pytest.mark.parametrize("text", ["wandb,wandb", "wanb", "tensorboard"])
def test_an_unknown_service_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"run\.track must be"):
        config.Run(track=tuple(text.split(",")))


def test_a_package_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name is no package."""
    (tmp_path / "notinstalled").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"run\.track notinstalled .*'\.\[track\]'"):
        trackers.check(["notinstalled"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"wandb": "../../x", "mlflow": 3}',
        "{",
        '{"steps": {"wandb": "3", "mlflow": -1}}',
    ],
)
def test_ids_from_outside_are_checked(tmp_path: Path, text: str) -> None:
    (tmp_path / "trackers.json").write_text(text)
    assert read_ids(tmp_path) == {} == read_steps(tmp_path)
