"""Modules outside the package add names to the registries; unknown names are refused."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from unic_ds.config import Balance, Config, Loss, Teacher, job, overrides, plugins, recipes
from unic_ds.config.methods import METHODS
from unic_ds.config.recipes import RECIPES

PLUGIN = """
from dataclasses import replace
from unic_ds.config import Config, Loss, Teacher
from unic_ds.config.methods import METHODS
from unic_ds.config.recipes import RECIPES

def my_recipe():
    return Config(
        plugins=(__name__,),
        teachers=(Teacher(name="a", source="zoo:a/b"), Teacher(name="b", source="timm:x")),
        loss=Loss(cls="1 huber"),
    )

def my_method(cfg):
    return replace(cfg, seed=7)

RECIPES["my_recipe"] = my_recipe
METHODS["my_method"] = my_method
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module on the path that registers a recipe and a method."""
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_plugin"
    RECIPES.pop("my_recipe", None)
    METHODS.pop("my_method", None)
    sys.modules.pop("my_plugin", None)


def test_a_plugin_adds_a_recipe_and_a_method(plugin):
    given = {"plugins": plugin, "teachers.a.size": "32", "balance.kind": "my_balancer"}
    cfg = job.configure("my_recipe+my_method", given)
    assert (cfg.plugins, cfg.seed, cfg.teachers[0].size) == ((plugin,), 7, 32)
    assert cfg.distance(cfg.teachers[0]).cls == {"huber": 1.0}
    assert overrides.from_dict(overrides.to_dict(cfg)) == cfg


def test_a_file_of_settings_names_its_plugins(plugin, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"plugins: [{plugin}]\nteachers: {{a: {{source: 'zoo:a'}}}}\n")
    assert recipes.get(str(file)).teachers[0].parsed_source.kind == "zoo"
    assert "my_recipe" not in RECIPES
    job.configure(str(file), {})
    assert "my_recipe" in RECIPES


def test_plugins_are_machinery():
    assert overrides.science(Config()) == overrides.science(Config(plugins=("a", "b")))


def test_a_plugin_that_is_not_there_is_one_sentence():
    with pytest.raises(ValueError, match=r"--plugins: cannot import 'no_such' .* on PYTHONPATH"):
        job.configure("unic_b", {"plugins": "no_such"})


UNKNOWN = [
    ({"loss": Loss(cls="1 cosin")}, r"a term of loss.cls must be .* \(did you mean cosine\?\)"),
    ({"balance": Balance(kind="droping")}, r"balance.kind must be .* \(did you mean dropping\?\)"),
    (
        {"teachers": (Teacher(name="a", source="time:x"),)},
        r"teachers.a.source's kind must be .* \(did you mean timm:\?\)",
    ),
    (
        {"teachers": (Teacher(name="a", source="timm:x", patch_loss="huber"),)},
        r"a term of teachers.a.patch_loss must be one of cosine, .*, got 'huber'",
    ),
]


@pytest.mark.parametrize(("given", "sentence"), UNKNOWN)
def test_an_unknown_name_is_refused_at_once_without_plugins(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**given)


@pytest.mark.parametrize(("given", "sentence"), UNKNOWN)
def test_with_plugins_it_is_refused_by_the_registries(given, sentence):
    cfg = Config(plugins=("mine",), **given)
    with pytest.raises(ValueError, match=sentence):
        plugins.check_names(cfg)
    known = replace(
        plugins.BUILT_IN,
        terms=(*plugins.BUILT_IN.terms, "cosin", "huber"),
        balancers=("dropping", "droping"),
        sources=("timm", "time"),
    )
    plugins.check_names(cfg, known)


def test_contrast_is_of_cls_tokens_alone():
    with pytest.raises(ValueError, match=r"loss.patch must have no contrastive"):
        Loss(patch="1 contrastive")
