"""The record of a run folder: whatever its files hold, also while they are written."""

import json
import math
import time

import numpy as np
import pytest
import yaml

from unic_ds.config import overrides, recipes
from unic_ds.report import run_record
from unic_ds.report.run_record import GrowingLog, current_stage, read


@pytest.fixture
def folder(tmp_path):
    """A run folder with settings alone."""
    plain = overrides.to_dict(recipes.get("quickstart"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    return tmp_path


def log(folder, *lines):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text)


def test_a_finished_run(finished):
    out, _ = finished
    record = read(out)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert record.finished and record.steps == record.last_step == 4
    assert record.name == out.name and record.settings.optim.steps == 4
    assert record.series["loss"].step_N.tolist() == [1, 2, 3, 4]
    assert record.series["loss"].value_N.tolist() == [row["loss"] for row in rows]
    assert set(record.series) == {name for row in rows for name in row} - {"step"}
    assert record.teachers == json.loads((out / "teachers.json").read_text())
    assert record.comparison is not None and "student after" in record.comparison.roles
    assert record.heartbeats == () or record.heartbeats == []
    assert record.written is not None and record.written.timestamp() <= time.time()


def test_values_that_are_no_finite_numbers(folder):
    big = {"step": 4, "loss": 1.0, "huge": 10**400}
    odd = {"step": 3, "loss": "inf", "grad_norm": None, "flag": True, "text": "x", "list": [1]}
    log(folder, {"step": 1, "loss": 2.5, "grad_norm": 1}, {"step": 2, "loss": "nan"}, odd, big)
    series = read(folder).series
    assert set(series) == {"loss", "grad_norm"}
    values = series["loss"].value_N.tolist()
    assert values[0] == 2.5 and math.isnan(values[1]) and values[2:] == [math.inf, 1.0]
    assert series["grad_norm"].step_N.tolist() == [1]


def test_a_log_cut_short_is_read_up_to_there(folder):
    log(folder, {"step": 1, "loss": 3.0}, "no json\n", "[1]\n", {"loss": 1.0}, {"step": -1})
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert read(folder).series["loss"].value_N.tolist() == [3.0, 2.0]
    log(folder)
    assert read(folder).series == {} and read(folder).last_step == 0
    (folder / "log.jsonl").unlink()
    assert read(folder).series == {} and read(folder).written is None


def test_of_lines_of_one_step_the_last_counts(folder):
    steps = [1, 2, 3, 2, 3, 4]
    log(folder, *({"step": step, "loss": float(i)} for i, step in enumerate(steps)))
    series = read(folder).series["loss"]
    assert series.step_N.tolist() == [1, 2, 3, 4]
    assert series.value_N.tolist() == [0.0, 3.0, 4.0, 5.0]


def test_a_growing_log_is_read_once(folder):
    log(folder, {"step": 1, "loss": 3.0}, '{"step": 2,')
    growing = GrowingLog(folder / "log.jsonl")
    assert read(folder, growing).last_step == 1
    at = growing.offset
    with (folder / "log.jsonl").open("a") as file:
        file.write(' "loss": 2.0}\n{"step": 3, "loss": 1.0}')
    assert read(folder, growing).series["loss"].value_N.tolist() == [3.0, 2.0, 1.0]
    assert growing.offset > at
    with (folder / "log.jsonl").open("a") as file:
        file.write("\n")
    assert read(folder, growing).last_step == 3
    replaced = folder / "new"
    replaced.write_text('{"step": 1, "loss": 9.0}\n' + " " * 500 + "\n")  # a resume drops lines
    replaced.replace(folder / "log.jsonl")
    assert read(folder, growing).series["loss"].value_N.tolist() == [9.0]


def test_events(folder):
    rows = [
        {"time": "2026-01-02T03:04:05+02:00", "event": "skipped", "step": 7, "why": "loss"},
        {"time": "2026-01-02T03:04:05", "event": "warning", "step": "7"},
        {"time": "yesterday", "event": "skipped"},
        {"time": "0001-01-01T00:00:00+10:00", "event": "skipped"},
        {"event": "no time"},
        {"time": "2026-01-02T03:04:05"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{")
    first, second = read(folder).events
    assert (first.name, first.step, first.facts) == ("skipped", 7, {"why": "loss"})
    assert first.time.isoformat() == "2026-01-02T01:04:05+00:00"
    assert (second.name, second.step, second.facts) == ("warning", None, {})


def test_folders_that_hold_no_readable_run(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no run folder: it has no config.yaml"):
        read(tmp_path / "none")
    for text in ("[1]", "student:\n  wings: 2\n", "a: b: c", "optim:\n  lr: -1\n"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match="another version of unic_ds wrote this run"):
            read(folder)


@pytest.mark.parametrize(
    "name, text",
    [
        ("teachers.json", "{"),
        ("teachers.json", "[]"),
        ("teachers.json", '{"dinov2": 3}'),
        ("evaluation.json", "{}"),
        ("evaluation.json", "{"),
        ("start.json", "[]"),
    ],
)
def test_other_files_that_are_damaged(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read(folder)


def test_series_stay_as_they_were_when_a_log_grows():
    columns, taken = run_record.Columns(), []
    for step in range(1, 400):
        columns.add({"step": step, "loss": 1 / step} | ({"rare": step} if step % 9 == 0 else {}))
        if step % 7 == 0:
            taken.append((step, columns.series()))
    for step, series in taken:
        steps_N = np.arange(1, step + 1)
        assert np.array_equal(series["loss"].step_N, steps_N)
        assert np.array_equal(series["loss"].value_N, 1 / steps_N)
        if step >= 9:
            assert series["rare"].value_N.tolist() == list(range(9, step + 1, 9))
    with pytest.raises(ValueError, match="read-only"):
        taken[0][1]["loss"].value_N[0] = 2.0
    columns.add({"step": 3, "loss": 7.0})
    loss = columns.series()["loss"]
    assert len(loss.step_N) == 399 and loss.value_N[2] == 7.0


def test_the_current_stage(folder):
    plain = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(plain | {"stages": "optim.steps=3"}))
    assert current_stage(folder) == folder  # nothing has begun
    first = folder / "stage1"
    first.mkdir()
    (first / "config.yaml").write_text(yaml.safe_dump(plain))
    assert current_stage(folder) == first
    (first / "student").mkdir()
    for name in ("student/model.safetensors", "results.json"):
        (first / name).write_text("")
    assert current_stage(folder) == folder


def test_a_log_of_a_hundred_thousand_lines_is_read_in_seconds(folder):
    row = {f"dinov2/{i}": 0.123456789 for i in range(16)} | {"loss": 1.5, "lr": 3e-4, "skipped": 0}
    with (folder / "log.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(json.dumps({"step": step, **row}) + "\n")
    start = time.process_time()
    record = read(folder)
    assert time.process_time() - start < 10  # 1 to 2 s on a quiet machine
    assert len(record.series["dinov2/15"].step_N) == 100_000 == record.last_step
    assert run_record.MOST_EVENTS >= len(record.events) == 0
