"""Findings about a run's health in its output and events, once each; and the facts of its start."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pictures import folder
from runs import ROOT, run, tiny, together

from unic_ds.config import ds_config, recipes
from unic_ds.planning import gpus, search
from unic_ds.report import run_record
from unic_ds.training import start_facts

STEPS = {
    "optim.steps": 24,
    "optim.warmup_epochs": 50,  # 100 steps
    "run.save_every": 12,
    "eval.on": "false",
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that stopped and went on, and what it printed."""
    made = tmp_path_factory.mktemp("health")
    folder(made / "train", 16)
    folder(made / "val", 8)
    plan = [tiny(made, "run", STEPS | {"run.stop_at": 12}), tiny(made, "run", STEPS)]
    (made / "plan.json").write_text(json.dumps(plan))
    return made / "run", run(together(made / "plan.json", 1))


def test_a_finding_is_printed_and_recorded_once(resumed):
    out, printed = resumed
    assert printed.count("warning: the warm-up takes all 24 steps") == 1
    event, again = run_record.read(out).events
    assert (again.name, again.step, again.facts) == ("resumed", 12, {"ranks": 1})
    assert (event.name, event.step) == ("warning", 10)
    assert event.facts["kind"] == "learning rate" and event.facts["since"] == 1
    assert event.facts["says"] in printed and "--optim.warmup_epochs" in event.facts["remedy"]


def test_the_facts_of_the_latest_start(resumed):
    out, _ = resumed
    facts = json.loads((out / "start.json").read_text())
    assert facts.pop("time").endswith("+00:00") and facts.pop("cores") >= 1
    assert facts == {"steps": 24, "images": 16, "ranks": 1, "device": "cpu"}
    assert run_record.read(out).steps == 24


def test_the_planned_mfu_is_that_of_the_plan():
    cfg = recipes.get("unic_b")
    cfg = replace(cfg, teachers=cfg.teachers[:1], student=replace(cfg.student, size=64))
    file, gpu = ds_config.read(ROOT / "ds_configs" / "zero2.json"), gpus.of_device("NVIDIA H200")
    assert gpu is not None and gpu.name == "h200" and gpus.of_device("cpu") is None
    settings, before = ds_config.merge(file, cfg, 8), torch.random.get_rng_state()
    mfu = start_facts.planned_mfu(cfg, settings, gpu, ranks=8, images=100_000)
    assert torch.equal(torch.random.get_rng_state(), before)
    (plan,) = search.plan_stages(cfg, file, gpu, 8, images=100_000, efficiency=gpus.Efficiency())
    assert mfu == plan.mfu and 0 < mfu < 1
