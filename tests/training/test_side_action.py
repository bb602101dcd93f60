"""Actions beside training end no run, and take a small share of its time."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from run_folders import run_folder

from unic_ds.files import run_files
from unic_ds.report import run_record
from unic_ds.training import side_action
from unic_ds.training.health_events import HealthEvents
from unic_ds.training.side_action import SideAction


def test_any_failure_is_said_once(capsys):
    calls = []

    def fails():
        calls.append(1)
        raise KeyError("lost")  # no error that a user's mistake or a full disk would raise

    action = SideAction(fails, name="page", instead="`x` writes it")
    assert [action.run(last=True) for _ in range(3)] == [False] * 3 and len(calls) == 3
    said = capsys.readouterr().out
    assert said.count("no page: ") == 1 and "lost" in said and "`x` writes it" in said


@pytest.mark.parametrize("fails", [False, True])
def test_a_slow_action_is_left_out_for_long(fails):
    calls = []

    def slow():
        calls.append(1)
        time.sleep(0.01)
        if fails:
            raise OSError

    action, begun = SideAction(slow, name="page", instead="x"), time.monotonic()
    while time.monotonic() < begun + 0.2:
        action.run()
    took = 0.01 / side_action.SHARE
    assert len(calls) == 1 and action.next_time >= begun + took
    assert action.run(last=True) == (not fails) and len(calls) == 2


@pytest.fixture
def checks(tmp_path):
    """Health checks of a run whose warm-up is as long as the run, with the parts that they use."""
    out = run_folder(tmp_path / "run", lines=0)
    run = SimpleNamespace(out=out, cfg=run_record.read(out).settings, steps=1000)

    def opened() -> HealthEvents:
        made = HealthEvents(run, SimpleNamespace(step=100, rollbacks=[]))
        for step in range(1, 101):
            made.add({"step": step, "lr": run.cfg.optim.peak * (step - 1) / 999})
        return made

    return out, opened


def test_a_finding_is_printed_if_it_cannot_be_recorded(checks, capsys):
    out, opened = checks
    found = opened()
    (out / run_files.EVENTS).unlink()
    (out / run_files.EVENTS).mkdir()
    found.check()
    assert "warning: the warm-up takes all" in capsys.readouterr().out
    assert found.checked.next_time > time.monotonic() and not found.checked.failed


def test_checks_that_cannot_begin_end_no_run(checks, capsys):
    out, opened = checks
    (out / run_files.START).write_text("[")
    found = opened()
    for _ in range(2):
        found.check()
    said = capsys.readouterr().out
    assert said.count("no health check: ") == 1 and "start.json' cannot be read" in said
    assert "warning" not in said
