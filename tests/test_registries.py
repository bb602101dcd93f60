"""A module outside the package adds one entry to each registry."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forked import Forked
from pictures import folder
from runs import TRAIN, curve, run, tiny

from unic_ds import config
from unic_ds.config import plugins
from unic_ds.config.recipes import RECIPES
from unic_ds.evaluate.registry import EVALUATORS
from unic_ds.losses import balance
from unic_ds.losses.balance import BALANCERS, Balancer
from unic_ds.losses.distill import distill_loss
from unic_ds.losses.terms import TERMS
from unic_ds.teachers import sources
from unic_ds.teachers.sources import SOURCES
from unic_ds.teachers.teacher import load
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import Target, Tokens

CPU = torch.device("cpu")
ROWS = tuple(
    config.Teacher(name=name, source=source, precision="fp32")
    for name, source in {"mine": "small:24", "theirs": "python:small_teacher:wide"}.items()
)


ENTRIES: tuple[tuple[dict[str, Any], str], ...] = (
    (SOURCES, "small"),
    (TERMS, "charbonnier"),
    (BALANCERS, "hardest"),
    (EVALUATORS, "patch_rank"),
    (RECIPES, "example"),
)
"""Entries of the plugin."""


@pytest.fixture
def plugin():
    """The plugin, whose entries are taken out of the registries afterwards."""
    yield importlib.import_module("example_plugin")
    for registry, name in ENTRIES:
        del registry[name]
    del sys.modules["example_plugin"]


def test_the_light_names_are_those_of_the_registries():
    assert list(SOURCES) == list(plugins.BUILT_IN.sources)
    assert list(TERMS) == list(plugins.BUILT_IN.terms)
    assert sorted(BALANCERS) == sorted(plugins.BUILT_IN.balancers)
    assert list(EVALUATORS) == list(plugins.BUILT_IN.tasks)


def test_a_kind_of_source_is_one_entry(plugin):
    standardise = config.Standardise()
    teachers = TeacherSet(ROWS, grid=2, standardise=standardise, device=CPU)
    assert teachers.widths == {"mine": 24, "theirs": 40}
    image_B3HW = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = teachers.features({32: image_B3HW})["mine"]
    want = plugin.Small(24)((image_B3HW / 255 - 0.5) / 0.5)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y)
    facts = teachers.manifest()["mine"]
    assert (facts["source"], facts["licence"], facts["width"]) == ("small:24", "MIT", 24)
    assert len(facts["sha256"]) == 64
    assert sources.outline(ROWS[0], grid=2).size == 32
    assert sources.fetch(ROWS[0])["bytes"] == 0


def test_an_unknown_kind_of_source_is_refused():
    with pytest.raises(ValueError, match=r"mine\.source .* timm:, open_clip:.*'small:24'"):
        load(ROWS[0], grid=2, device=CPU)


@pytest.mark.parametrize("rungs", [0, 2])
def test_a_term_is_one_entry(plugin, rungs):
    draw = torch.Generator().manual_seed(0)
    shapes = ((5, 6), (5, 4, 6))
    leading = (rungs,) if rungs else ()
    pred = Tokens(*(torch.randn(*leading, *s, generator=draw, requires_grad=True) for s in shapes))
    target = Target.of(Tokens(*(torch.randn(s, generator=draw) for s in shapes)))
    distance = config.Distance({"charbonnier": 2.0}, {"cosine": 0.5, "charbonnier": 0.25})
    loss, metrics = distill_loss(
        {"t": pred},
        {"t": target},
        torch.zeros(1, 5),
        loss=config.Loss(),
        balance=Balancer(torch.ones(1)),
        distances={"t": distance},
    )
    gaps = [
        np.sqrt((p - t).square().double().detach().numpy() + 1e-6).mean()
        for p, t in zip(pred, target.features, strict=True)
    ]
    cosine = torch.cosine_similarity(pred.patch_BNC, target.features.patch_BNC, dim=-1).mean()
    want = (2.0 * gaps[0] + 0.5 * (1 - cosine.item()) + 0.25 * gaps[1]) / 2
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert {"t/cls_cosine", "t/patch_smooth_l1"} <= metrics.keys()
    loss.backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in pred)


def test_a_balancer_is_one_entry(plugin):
    kind = config.Balance(kind="hardest")
    cfg = config.Config(teachers=ROWS, balance=kind, plugins=("example_plugin",))
    loss_TB = torch.tensor([[1.0, 3.0], [2.0, 1.0]])
    coefficient_TB = balance.build(cfg)(loss_TB, torch.rand(2, 2))
    assert coefficient_TB.tolist() == [[0.0, 0.5], [0.5, 0.0]]


RUN = {
    "plugins": "example_plugin",
    "teachers": "mine=small:24,theirs=python:small_teacher:wide",
    "loss.cls": "0.5 cosine + 0.5 charbonnier",
    "balance.kind": "hardest",
    "eval.on": "false",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with images to train on and to evaluate on, not a multiple of two ranks."""
    made = tmp_path_factory.mktemp("registries")
    for side in ("train", "val"):
        folder(made / side, 17)
    return made


@pytest.mark.dist
def test_a_run_takes_one_of_each(images):
    words = tiny(images, "run", {"plugins": "example_plugin", "recipe": "example"})
    at = words.index("--teachers")
    printed = run(Forked(2, [TRAIN, *words[:at], *words[at + 2 :]]))
    rows = curve(images / "run")
    assert list(rows) == [1, 2, 3]
    for row in rows.values():
        assert row["loss"] > 0
        assert row["mine/kept"] + row["theirs/kept"] == pytest.approx(1)
    facts = json.loads((images / "run" / "teachers.json").read_text())
    assert (facts["mine"]["source"], facts["mine"]["licence"]) == ("small:24", "MIT")
    cfg = yaml.safe_load((images / "run" / "config.yaml").read_text())
    assert (cfg["plugins"], cfg["balance"]["kind"]) == (["example_plugin"], "hardest")
    results = json.loads((images / "run" / "results.json").read_text())
    assert list(results) == ["pixels", "mine", "theirs", "student before", "student after"]
    for name, row in results.items():
        assert ("patch_rank" in row) == (name != "pixels") and {"knn", "linear"} <= row.keys()
        assert name == "pixels" or row["patch_rank"] >= 1
    assert "patch_rank" in printed and "patch_rank of 17 validation images" in printed
    found = json.loads((images / "run" / "evaluation.json").read_text())
    (row,) = (row for row in found["rows"] if row["name"] == "patch_rank")
    assert row["protocols"].keys() == row["values"].keys() == results.keys() - {"pixels"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"loss.cls": "charbonier"}, "did you mean charbonnier?"),
        ({"balance.kind": "hardst"}, "did you mean hardest?"),
        ({"teachers": "mine=smal:24"}, "did you mean small:?"),
    ],
)
def test_a_name_that_no_plugin_has_is_refused(images, given, sentence):
    printed = run(Forked(1, [TRAIN, *tiny(images, "refused", RUN | given)]), code=2)
    assert sentence in printed
