"""Schedules against the published vectors; parameter groups."""

import json
from pathlib import Path

import pytest
from torch import nn

from unic_ds import optim
from unic_ds.config import Optim, Standardise

VECTORS = json.loads((Path(__file__).parent / "data" / "schedules.json").read_text())


@pytest.mark.parametrize("name", ["lr", "tnorm_momentum"])
def test_schedules_equal_the_published_vectors(name):
    args, want = VECTORS[name]["args"], VECTORS[name]["values"]
    a_epoch = args["niter_per_ep"]
    got = [
        optim.warmup_cosine(
            i,
            steps=args["epochs"] * a_epoch,
            peak=args["base_value"],
            end=args["final_value"],
            warmup=args["warmup_epochs"] * a_epoch,
        )
        for i in range(len(want))
    ]
    assert got == pytest.approx(want, rel=1e-5, abs=1e-12)


def test_the_loop_s_step_starts_at_1():
    lr = VECTORS["lr"]
    cfg = Optim(batch_size=256, lr=6e-4, epochs=20, warmup_epochs=3)
    got = [optim.learning_rate(s, cfg, 13 * 256) for s in range(1, 261)]
    assert got == pytest.approx(lr["values"], rel=1e-5, abs=1e-12)
    momentum = [optim.momentum(s, Standardise(), 260) for s in range(1, 261)]
    assert momentum == pytest.approx(VECTORS["tnorm_momentum"]["values"], rel=1e-5)


def test_statistics_freeze():
    cfg = Standardise(freeze_after=500)
    assert optim.momentum(1, cfg, 100_000) == 1
    assert 0.001 <= optim.momentum(500, cfg, 100_000) < 0.002  # settled before it is frozen
    assert optim.momentum(501, cfg, 100_000) == 0


@pytest.mark.parametrize(("scaling", "peak"), [("linear", 8e-4), ("sqrt", 4e-4), ("none", 2e-4)])
def test_peak_grows_with_the_batch_as_asked(scaling, peak):
    assert Optim(batch_size=1024, lr=2e-4, lr_batch=256, lr_scaling=scaling).peak == pytest.approx(
        peak
    )


def test_biases_and_norms_are_not_decayed():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[1].weight.requires_grad_(False)
    groups = {g["weight_decay"]: g["params"] for g in optim.groups(module, 0.03)}
    assert [p.shape for p in groups[0.03]] == [(4, 3)]
    assert sorted(tuple(p.shape) for p in groups[0.0]) == [(4,), (4,)]
