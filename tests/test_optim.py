"""Schedules against the published vectors; parameter groups."""

from pathlib import Path

import parity
import pytest
from torch import nn

from unic_ds import optim
from unic_ds.config import Optim, Standardise

VECTORS = Path(__file__).parent / "data" / "schedules.json"


def test_the_loop_s_schedules_equal_the_published_vectors():
    assert parity.over(parity.check_schedules(VECTORS)) == []


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
