"""The other methods as recipes: what each changes, and each trained for real."""

import json

import pytest
from runs import DEMONSTRATION, curve, options, run, together

from unic_ds.config import job, methods, recipes
from unic_ds.config.overrides import science

TEACHERS = "a=timm:resnet50,b=timm:vit_small_patch16_224"


def changed(name):
    """Dotted settings in which a recipe differs from unic_b on two teachers."""
    base = science(job.configure("unic_b", {"teachers": TEACHERS}))
    mine = science(job.configure(name, {"teachers": TEACHERS}))
    return {k: mine.get(k) for k in mine.keys() | base.keys() if mine.get(k) != base.get(k)}


def test_a_method_alone_stands_on_unic_b():
    alone, composed = recipes.get("crd"), recipes.get("unic_b+crd")
    assert science(alone) == science(composed)
    assert (alone.recipe, composed.recipe) == ("crd", "unic_b+crd")


def test_plain_several_teachers():
    found = changed("standard")
    assert found["ladder.rungs"] == "last"
    assert found["balance.kind"] == "none"
    assert found["standardise.on"] == "False"
    assert "standardise.on" not in changed("standard_norm")


def test_fitnet_hints_from_the_last_teacher_s_middle():
    rows = job.configure("fitnet", {"teachers": TEACHERS}).teachers
    assert [row.name for row in rows] == ["b", "b_hint"]
    assert rows[0].source == rows[1].source == "timm:vit_small_patch16_224"
    hint = rows[1]
    assert (hint.block, hint.rungs, hint.cls_loss, hint.patch_loss) == (
        "middle",
        "middle",
        "none",
        "1 mse",
    )


def test_crd_contrasts_cls_tokens():
    found = changed("crd")
    assert (found["loss.cls"], found["loss.patch"]) == ("1 contrastive", "none")


def test_dune_projects_by_a_transformer_block():
    found = changed("dune")
    assert (found["ladder.projector"], found["ladder.rungs"]) == ("transformer", "last")


def test_theia_learns_patches_on_fixed_statistics():
    found = changed("theia")
    assert (found["loss.cls"], found["loss.patch"]) == ("none", "0.9 cosine + 0.1 smooth_l1")
    assert found["standardise.fit_steps"] == "100"


def test_radio_rotates_by_phi_s():
    found = changed("radio")
    assert (found["loss.cls"], found["standardise.kind"]) == ("1 cosine", "phi_s")


def test_an_option_after_the_recipe_still_counts():
    cfg = job.configure(
        "quickstart+dune", {"balance.kind": "dropping", "teachers.effnet.weight": "2"}
    )
    assert cfg.balance.kind == "dropping"
    assert cfg.teachers[0].weight == 2
    assert cfg.student == recipes.get("quickstart").student


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("quickstart+duen", "did you mean dune"),
        ("quickstrt+dune", "did you mean quickstart"),
        ("dune+quickstart", "unknown --recipe"),
    ],
)
def test_a_recipe_that_is_not_there_is_named(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        recipes.get(name)


@pytest.mark.slow
@DEMONSTRATION
def test_every_method_trains_on_two_ranks_with_any_balancer(tmp_path):
    """One launch: each method for three steps under ZeRO-2, the balancers spread over them."""
    kinds = {"fitnet": "adaloss", "crd": "dropping", "dune": "fixed"}
    kinds |= {"theia": "famo", "radio": "mgda"}
    plan = []
    for name in methods.METHODS:
        more = {"recipe": f"quickstart+{name}", "optim__steps": 3, "eval__on": "false"}
        if name in ("theia", "radio"):
            more["standardise__fit_steps"] = 2
        if name in kinds:
            more["balance__kind"] = kinds[name]
        if name == "fitnet":  # one teacher, read twice
            more |= {"teachers__effnet__size": None, "teachers__effnet__precision": None}
            more["teachers__dinov2_hint__size"] = "28"
        plan.append(options(tmp_path / name, **more))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run(together(tmp_path / "plan.json"))
    curves = {name: curve(tmp_path / name) for name in methods.METHODS}
    assert all(row["grad_norm"] > 0 for rows in curves.values() for row in rows.values())
    assert len({rows[1]["loss"] for rows in curves.values()}) == len(curves)
    assert "dinov2_hint/patch_cosine" in curves["fitnet"][1]
    assert "dinov2_hint/cls_cosine" not in curves["fitnet"][1]
    assert (tmp_path / "dune" / "student" / "model.safetensors").is_file()
    for name in methods.METHODS:
        shares = [v for k, v in curves[name][3].items() if k.endswith("/weight")]
        if kinds.get(name) != "dropping" and name != "unic":
            assert sum(shares) == pytest.approx(1, rel=1e-5), name
