"""Schedules against the published vectors; parameter groups."""

from pathlib import Path

import parity
import pytest
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import AdamW

from unic_ds import config
from unic_ds.config import Optim, Standardise
from unic_ds.engine import optim
from unic_ds.models.ladder import Head
from unic_ds.models.student import Student

VECTORS = Path(__file__).parents[1] / "vectors" / "schedules.json"


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


def test_each_layer_has_its_scale_and_one_is_the_same_for_all():
    student = Student(
        config.Student(model="vit_tiny_patch16_224", size=32),
        config.Ladder(rungs="11", width=8),
        {"a": Head(6)},
        seed=0,
    )
    plain = optim.groups(student, 0.03)
    assert [(g["weight_decay"], g["lr_scale"]) for g in plain] == [(0.0, 1.0), (0.03, 1.0)]
    groups = optim.groups(student, 0.03, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    encoder = student.encoder
    assert scale[id(encoder.pos_embed)] == scale[id(encoder.patch_embed.proj.weight)] == 0.5**12
    for i, block in enumerate(encoder.blocks):
        assert {scale[id(p)] for p in block.parameters()} == {0.5 ** (11 - i)}
    assert {scale[id(p)] for p in student.ladder.parameters()} == {1.0}
    assert scale.keys() == {id(p) for g in plain for p in g["params"]}
    # timm's own grouping of the bare encoder, its head's place taken by the ladder
    theirs = param_groups_layer_decay(encoder, 0.03, layer_decay=0.5)
    assert all(scale[id(p)] == g["lr_scale"] for g in theirs for p in g["params"])
    assert all(
        g["weight_decay"] == (0.03 if p.ndim > 1 else 0) for g in groups for p in g["params"]
    )
    optimizer = AdamW(groups)
    optim.apply(optimizer, 0.2)
    assert all(g["lr"] == pytest.approx(0.2 * g["lr_scale"]) for g in optimizer.param_groups)


@pytest.mark.parametrize("value", [0, 1.5])
def test_a_layer_decay_is_checked(value):
    with pytest.raises(ValueError, match="layer_decay must be in"):
        Optim(layer_decay=value)
