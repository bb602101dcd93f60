"""Findings: each on a series that has it, none on one that is well, and true ones on a real run."""

import math
import re
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from unic_ds import cli
from unic_ds.config import overrides, recipes
from unic_ds.report import health, run_record
from unic_ds.report.health import Finding, findings
from unic_ds.report.run_record import Event, RunRecord, Series

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
QUICKSTART = recipes.get("quickstart")
PEAK = QUICKSTART.optim.peak


def record(lines: int = 400, every: int = 10, **changes) -> RunRecord:
    """A healthy run in the middle of its training: losses fall with noise, teachers improve."""
    step_N = np.arange(1, lines + 1) * every
    draw, falls_N = np.random.default_rng(0), 1 / (1 + step_N / 500)
    values = {
        "loss": 0.4 + falls_N * draw.normal(1, 0.05, lines),
        "lr": PEAK * np.minimum(1, step_N / 200),
        "samples": step_N * 64.0,
        "images_per_s": draw.normal(640, 20, lines),
        "data_wait_share": draw.uniform(0, 0.1, lines),
        "mfu": draw.normal(0.35, 0.02, lines),
        "skipped": np.zeros(lines),
        "bad_images": np.zeros(lines),
    }
    for name in ("effnet", "dinov2"):
        for kind in ("cls", "patch"):
            values[f"{name}/{kind}_cosine"] = 0.8 - 0.5 * falls_N
            values[f"{name}/{kind}_smooth_l1"] = 0.2 + 0.5 * falls_N
        values[f"{name}/weight"] = draw.normal(0.5, 0.05, lines)
    series = {name: Series(step_N, value_N) for name, value_N in values.items()}
    made = RunRecord(
        folder=Path("runs/x"),
        name="x",
        settings=QUICKSTART,
        series=series | changes.pop("series", {}),
        events=(),
        teachers={},
        comparison=None,
        steps=10_000,
        finished=False,
        written=NOW,
    )
    return replace(made, **changes)


def changed(name: str, change, **others) -> RunRecord:
    """`record` with one series changed in place by a function."""
    made = record(**others)
    series = made.series[name]
    value_N = series.value_N.copy()
    change(series.step_N, value_N)
    return replace(made, series={**made.series, name: Series(series.step_N, value_N)})


def only(made: RunRecord, now: datetime = NOW) -> Finding:
    """The one finding about a record."""
    (found,) = findings(made, now=now)
    return found


def test_a_healthy_run_has_no_findings():
    assert findings(record(), now=NOW) == []
    assert findings(record(lines=10_000, steps=200_000), now=NOW) == []
    assert findings(record(lines=3), now=NOW) == []
    assert findings(replace(record(), series={}), now=NOW) == []


def test_a_healthy_real_run_has_no_findings(finished):
    out, _ = finished
    made = run_record.read(out)
    assert made.last_step == 4 and "dinov2/weight" in made.series
    assert findings(made, now=datetime.now(UTC) + timedelta(days=1)) == []


def test_data_wait():
    def slow(step_N, value_N):
        value_N[step_N > 2000] = 0.4
        value_N[::7] = 0.9  # single slow lines before do not count

    found = only(changed("data_wait_share", slow))
    assert found.kind == "data wait" and found.message.startswith("40% of the time")
    assert abs(found.step - 2000) <= 10 * health.LINES and "--data.threads" in found.remedy

    def recovers(step_N, value_N):
        slow(step_N, value_N)
        value_N[step_N > 3500] = 0.1

    assert findings(changed("data_wait_share", recovers), now=NOW) == []


def test_mfu_is_compared_with_the_plan_if_there_is_one():
    assert only(record(start={"planned_mfu": 0.8})).kind == "MFU"
    assert findings(record(start={"planned_mfu": 0.5}), now=NOW) == []
    assert findings(record(start={"planned_mfu": "0.8"}), now=NOW) == []


def test_a_dominant_teacher_by_the_best_value_that_is_logged():
    step_N = record().series["loss"].step_N
    few, most = Series(step_N, np.full(400, 0.1)), Series(step_N, np.full(400, 0.9))
    made = record(series={"effnet/weight": few, "dinov2/weight": most})
    found = only(made)
    assert (found.kind, found.teacher, found.step) == ("dominant teacher", "dinov2", 10)
    assert "dinov2 has 90% of the weight in the loss" in found.message
    shares = {"effnet/loss_share": few, "dinov2/loss_share": most}
    assert "dinov2 has 90% of the kept loss" in only(record(series=shares)).message
    fair = {
        f"{name}/loss_share": Series(step_N, np.full(400, 0.5)) for name in ("effnet", "dinov2")
    }
    assert findings(replace(made, series={**made.series, **fair}), now=NOW) == []


def test_a_teacher_that_does_not_improve():
    stuck = record()
    names = [name for name in stuck.series if name.startswith("effnet/") and "weight" not in name]
    flat = {
        name: Series(series.step_N, np.where(series.step_N > 1500, 0.4, series.value_N))
        for name, series in stuck.series.items()
        if name in names
    }
    stuck = replace(stuck, series={**stuck.series, **flat})
    found = only(stuck)
    assert (found.kind, found.teacher, found.step) == ("stuck teacher", "effnet", 3000)
    assert "1,000 steps" in found.message
    never = {"effnet/global_cosine": Series(stuck.series["loss"].step_N, np.full(400, math.nan))}
    assert only(replace(stuck, series={**stuck.series, **never})) == found
    one_improves = {**stuck.series, names[0]: record().series[names[0]]}
    assert findings(replace(stuck, series=one_improves), now=NOW) == []
    low = Series(stuck.series["lr"].step_N, np.full(400, PEAK / 100))
    assert findings(replace(stuck, series={**stuck.series, "lr": low}), now=NOW) == []


def test_loss_spikes():
    def spike(step_N, value_N):
        value_N[[250, 251, 300]] = 8.0, 7.0, 5.0
        value_N[260] = math.nan

    found = only(changed("loss", spike))
    assert found.kind == "loss spikes" and found.step == 2510
    assert "spiked 2 times, last at step 3,010: 5," in found.message
    assert "--run.spike 10" in found.remedy
    guarded = replace(QUICKSTART, run=replace(QUICKSTART.run, spike=10))
    assert "--run.spike" not in only(changed("loss", spike, settings=guarded)).remedy


def test_features_that_collapse():
    def probes(*values):
        return {"probe/rankme": Series(np.arange(1, len(values) + 1) * 500, np.array(values))}

    found = only(record(series=probes(40.0, 60.0, 50.0, 30.0)))
    assert (found.kind, found.step) == ("features collapse", 1500)
    assert "from 60 to 30" in found.message
    for well in ((40.0, 60.0, 55.0), (60.0, 20.0), (20.0, 40.0, math.nan)):
        assert findings(record(series=probes(*well)), now=NOW) == []


def test_a_warm_up_as_long_as_the_run_is_seen_early_and_late():
    def rises(step_N, value_N):
        value_N[:] = PEAK * (step_N - 1) / 9_999

    for lines in (5, 400, 1000):
        assert only(changed("lr", rises, lines=lines)).kind == "learning rate"
    assert findings(changed("lr", rises, steps=20_000), now=NOW) == []
    assert findings(changed("lr", rises, steps=None), now=NOW) == []


def test_skipped_steps_and_roll_backs():
    def skips(step_N, value_N):
        value_N[[100, 200, 300]] = 20

    found = only(changed("skipped", skips))
    assert (
        found.kind == "skipped steps" and found.step == 1010 and "60 of the last" in found.message
    )

    def few(step_N, value_N):
        value_N[[100, 200, 300]] = 1

    assert findings(changed("skipped", few), now=NOW) == []
    back = Event(NOW, "rolled back", None, {"at": 900, "to": 800, "left_out": [896, 900]})
    assert findings(record(events=[back]), now=NOW) == []
    found = only(record(events=[back, back]))
    assert (found.kind, found.step) == ("roll-backs", 900) and "2 times" in found.message


def test_unreadable_images():
    def breaks(step_N, value_N):
        value_N[50:] = 1

    found = only(changed("bad_images", breaks))
    assert (found.kind, found.step) == ("unreadable images", 510)
    assert "`unreadable` in events.jsonl names them" in found.remedy
    assert found.message.startswith("1 image could")


def test_a_run_that_has_not_logged_for_long():
    later = NOW + timedelta(minutes=10)
    beat = {"rank": 0, "phase": "teachers", "time": later.timestamp(), "idle_s": 600.0}
    found = only(record(heartbeats=[beat]), later)
    assert found.kind == "stalled" and "10 min" in found.message
    assert "rank 0 was last in phase 'teachers'" in found.message
    for lives in ({"idle_s": 3.0}, {"phase": "saving"}):
        assert findings(record(heartbeats=[beat | lives]), now=later) == []
    hostile = {"rank": "1\x1b", "phase": ["\x1b"], "time": "nan", "idle_s": {}}
    odd = only(record(heartbeats=[hostile]), NOW + timedelta(hours=1))
    assert odd.kind == "stalled" and odd.message.isprintable()
    assert "unic-ds doctor runs/x" in found.remedy
    assert only(record(), later).kind == "stopped"
    slow = Series(record().series["loss"].step_N, np.full(400, 0.5))  # 21 minutes between lines
    assert findings(record(series={"images_per_s": slow}, heartbeats=[beat]), now=later) == []
    for over in ({"finished": True}, {"steps": 4000}, {"written": None}):
        assert findings(record(**over), now=later) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, 5e-324, 0.0])
def test_any_number_in_a_log_gives_sentences(value):
    made = record()
    series = {name: Series(row.step_N, np.full(400, value)) for name, row in made.series.items()}
    series["probe/rankme"] = Series(np.arange(1, 5), np.array([1.0, value, 2.0, value]))
    for found in findings(replace(made, series=series), now=NOW + timedelta(days=400)):
        assert found.message.isprintable() and found.remedy.isprintable()


def test_every_option_and_verb_of_a_remedy_exists():
    text = Path(health.__file__).read_text()
    known = {*overrides.option_names()}
    known |= {f.name for module in cli.VERBS.values() for f in fields(module.VERB.options)}
    named = re.findall(r"--([a-z_]+(?:\.[A-Za-z_{}]+)*)", text)
    assert len(named) > 10
    for name in named:
        assert re.sub(r"^teachers\.[^.]+\.", "teachers.NAME.", name) in known, name
    verbs = re.findall(r"`unic-ds ([a-z ]+?)(?:`| \{|\"|$)", text)
    assert {"doctor", "plan", "pack"} <= {*verbs} <= {*cli.VERBS}
