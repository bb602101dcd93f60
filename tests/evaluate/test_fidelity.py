"""Agreement with the teachers against direct fp64 formulas and cases with known answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from agreeing_models import measured, predicting, teacher, tokens_set
from forked import Forked
from memory_sets import scores_of
from runs import SUPPORT, run
from torch import Tensor
from torch.nn import functional as F

from unic_ds.config import Eval
from unic_ds.evaluate import fidelity
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.features import Model
from unic_ds.tokens import Tokens, to_grid

pytestmark = pytest.mark.filterwarnings("error")


def values(scores: list[Score]) -> dict[str, float]:
    """Name without `teacher a ` -> value."""
    return {score.name.removeprefix("teacher a "): score.value for score in scores}


def test_a_perfect_prediction_has_the_best_scores() -> None:
    images = tokens_set(40, seed=1)
    scores = scores_of("teacher", [teacher("a"), predicting("student", "a")], {"val": images})
    assert {score.model for score in scores} == {"student"}
    found = values(scores)
    for kind in ("cls", "patch"):
        assert found[f"{kind} fidelity"] == fidelity.MOST
        assert found[f"{kind} cosine"] == pytest.approx(1, abs=1e-12)
        assert found[f"{kind} smooth-l1"] == 0
        assert found[f"{kind} cka"] == pytest.approx(1, abs=1e-12)
    assert len(found) == 8
    better = {score.name.split()[-1]: score.better for score in scores}
    assert better == {"fidelity": "higher", "cosine": "higher", "smooth-l1": "lower"} | {
        "cka": "higher"
    }
    cosine = next(score.protocol for score in scores if score.name.endswith("cosine"))
    assert cosine == ("teacher cosine: cosine of features standardised on 40 images 40 images 8 px")


def test_the_mean_as_prediction_has_fidelity_1_and_independent_features_no_cka() -> None:
    images = tokens_set(60, seed=2)
    mean = Tokens(*(x.flatten(0, -2).mean(0).expand_as(x) for x in teacher("a").tokens_of(images)))
    constant = predicting("student", "a", change=lambda t: mean_like(t, mean))
    found = values(scores_of("teacher", [teacher("a"), constant], {"val": images}))
    for kind in ("cls", "patch"):
        assert found[f"{kind} fidelity"] == pytest.approx(1, rel=1e-5)
    draw = torch.Generator().manual_seed(3)
    noise = predicting("student", "a", change=lambda t: Tokens(*(noisy(x, draw) for x in t)))
    found = values(scores_of("teacher", [teacher("a"), noise], {"val": images}))
    assert abs(found["cls cka"]) < 0.2 and abs(found["patch cka"]) < 0.02
    assert abs(found["cls cosine"]) < 0.1


def mean_like(tokens: Tokens, mean: Tokens) -> Tokens:
    """The mean for each token."""
    return Tokens(*(m[: len(t)] for m, t in zip(mean, tokens, strict=True)))


def noisy(x: Tensor, draw: torch.Generator) -> Tensor:
    """Noise of that shape."""
    return torch.randn(x.shape, generator=draw)


@pytest.mark.parametrize("count, batch", [(30, 7), (520, 520)])
def test_measures_are_the_direct_formulas(count: int, batch: int) -> None:
    images = tokens_set(count, seed=4, batch=batch)  # few, or more than are fitted to at once
    half = predicting("student", "a", change=lambda t: Tokens(*(bent(x) for x in t)))
    found = values(scores_of("teacher", [teacher("a"), half], {"val": images}))
    spread = np.linspace(0, count - 1, min(fidelity.FITTED, count)).astype(int)
    for kind, target in zip(("cls", "patch"), teacher("a").tokens_of(images), strict=True):
        fit_NC = target[spread].flatten(0, -2).double()
        target_NC = target.flatten(0, -2).double()
        expected = direct(target_NC, bent(target).flatten(0, -2).double(), fit_NC)
        for measure, value in expected.items():
            assert found[f"{kind} {measure}"] == pytest.approx(value, rel=1e-9), (kind, measure)


def bent(x: Tensor) -> Tensor:
    """A prediction with an error, also in its mean; the last channel is constant."""
    return (0.8 * x + 0.1 * x.roll(1, -1).sin() + 0.05) * (torch.arange(x.shape[-1]) < 5)


def direct(target_NC: Tensor, pred_NC: Tensor, fit_NC: Tensor) -> dict[str, float]:
    """The measures as they are written in the papers."""
    error = (pred_NC - target_NC).square().sum(1).mean()
    std_C = fit_NC.std(0, correction=0)
    std_C = std_C.maximum(0.1 * std_C.median())
    y_NC, z_NC = ((x - fit_NC.mean(0)) / std_C for x in (target_NC, pred_NC))
    return {
        "fidelity": float(target_NC.var(0, correction=0).sum() / error),
        "cosine": float(F.cosine_similarity(y_NC, z_NC).mean()),
        "smooth-l1": float(F.smooth_l1_loss(z_NC, y_NC)),
        "cka": direct_hsic(target_NC, pred_NC)
        / math.sqrt(direct_hsic(target_NC, target_NC) * direct_hsic(pred_NC, pred_NC)),
    }


def direct_hsic(x_NC: Tensor, y_NC: Tensor) -> float:
    """Song et al. 2012, equation 5, by kernels of N x N."""
    n = len(x_NC)
    off_NN = 1 - torch.eye(n, dtype=torch.float64)
    k_NN, l_NN = (x_NC @ x_NC.T) * off_NN, (y_NC @ y_NC.T) * off_NN
    total = (k_NN * l_NN).sum() + k_NN.sum() * l_NN.sum() / ((n - 1) * (n - 2))
    return float((total - 2 * k_NN.sum(0) @ l_NN.sum(0) / (n - 2)) / (n * (n - 3)))


def test_the_teachers_map_is_resized_to_the_students_grid() -> None:
    images = tokens_set(20, seed=5)
    wider = predicting("student", "a", change=lambda t: to_grid(t, 3))
    found = values(scores_of("teacher", [teacher("a"), wider], {"val": images}))
    assert found["patch fidelity"] == fidelity.MOST and found["patch cosine"] > 1 - 1e-12


def test_kinds_and_teachers_that_a_student_lacks_are_left_out() -> None:
    images = tokens_set(20, seed=6)
    cls_only = predicting("student", "a", change=lambda t: Tokens(t.cls_BC, t.cls_BC.new_empty(0)))
    models = [teacher("a"), teacher("b"), cls_only]
    names = {score.name for score in scores_of("teacher", models, {"val": images})}
    assert names == {f"teacher a cls {measure}" for measure in fidelity.MEASURES}
    assert scores_of("teacher", [teacher("b")], {"val": images}) == []
    assert scores_of("teacher", [teacher("b"), cls_only], {"val": images}) == []


@pytest.mark.parametrize("task", ["teacher", "resolutions"])
def test_a_teacher_is_known_by_its_own_name_whatever_its_model_is_called(task: str) -> None:
    images = tokens_set(12, seed=6)
    student, sets = predicting("student", "a"), {"train": images, "val": images}

    def agreed(*teachers: Model) -> dict[str, float]:
        scores = scores_of(task, [*teachers, student], sets, Eval(sizes=(8,), k=(3,)))
        return {s.name: s.value for s in scores if s.model == "student"}

    assert agreed(teacher("a", "mine")) == agreed(teacher("a"))
    with pytest.raises(RuntimeError, match="models 'a' and 'mine' are both teacher 'a'; leave one"):
        agreed(teacher("a"), teacher("a", "mine"))


def test_another_width_and_nan_are_refused() -> None:
    images = tokens_set(20, seed=7)
    thin = predicting("student", "a", change=lambda t: Tokens(*(x[..., :4] for x in t)))
    with pytest.raises(RuntimeError, match="predicts 4 channels of teacher 'a', which has 6: it"):
        scores_of("teacher", [teacher("a"), thin], {"val": images})
    broken = predicting("student", "a", change=lambda t: Tokens(*(x * math.nan for x in t)))
    with pytest.raises(RuntimeError, match="are NaN or infinite; leave the task teacher out"):
        scores_of("teacher", [teacher("a"), broken], {"val": images})


def test_cka_takes_every_third_of_36_tokens_and_the_rest_takes_all() -> None:
    draw = torch.Generator().manual_seed(8)
    target_NC, pred_NC = (torch.randn(3 * 36, 5, generator=draw) for _ in range(2))
    scale = fidelity.Scale(torch.zeros(5), torch.ones(5))
    all_of_them, third, none = (
        fidelity.empty_sums(target_NC, 8, cka=cka) for cka in (True, True, False)
    )
    all_of_them.add(target_NC, pred_NC, scale, per_image=36)
    none.add(target_NC, pred_NC, scale, per_image=36)
    third.add(target_NC[::3], pred_NC[::3], scale, per_image=12)
    assert all_of_them.measures()["cka"] == pytest.approx(third.measures()["cka"], rel=1e-9)
    for measure in ("fidelity", "cosine", "smooth-l1"):
        assert all_of_them.measures()[measure] == none.measures()[measure]
        assert all_of_them.measures()[measure] != third.measures()[measure]


def test_resolutions_measures_each_size_that_a_model_takes() -> None:
    sets = {"train": tokens_set(40, seed=10), "val": tokens_set(24, seed=11)}
    freed: list[int] = []
    models = [teacher("a"), predicting("student", "a", freed=freed)]
    options = Eval(k=(3, 5), sizes=(5, 8, 15))  # 4, 8 and 16 px of a student with patches of 4
    scores = scores_of("resolutions", models, sets, options)
    names = {(score.model, score.name): score for score in scores}
    measured = [
        ("student", f"resolutions {what} {size}")
        for size in (5, 8, 15)
        for what in ("knn", "a fidelity")
    ]
    assert names.keys() == {*measured, ("a", "resolutions knn 8")}
    assert len(scores) == len(names) and sorted(freed) == [4, 4, 16, 16]  # for kNN and fidelity
    plain = {score.model: score.value for score in scores_of("knn", models, sets, Eval(k=(3,)))}
    for model in ("a", "student"):
        assert names[model, "resolutions knn 8"].value == plain[model]
    assert names["student", "resolutions a fidelity 8"].value == fidelity.MOST
    assert names["student", "resolutions knn 15"].protocol.endswith("40/24 images 16 px")
    lower = names["student", "resolutions a fidelity 5"]
    small = predicting("student", "a", side=4)
    known = values(scores_of("teacher", [teacher("a"), small], sets))
    both = (known["cls fidelity"] + known["patch fidelity"]) / 2
    assert lower.value == pytest.approx(both, rel=1e-12) and known["patch fidelity"] < 10
    assert lower.protocol.endswith("student at 4 px, bicubic map") and lower.unit == ""


def test_a_size_that_a_model_cannot_be_built_for_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def at(side: int) -> Model:
        raise ValueError(f"it takes 8 px, not {side}")

    sets = {"train": tokens_set(12, seed=14), "val": tokens_set(8, seed=15)}
    models = [teacher("a"), replace(predicting("student", "a"), at=at)]
    names = {s.name for s in scores_of("resolutions", models, sets, Eval(k=(3,), sizes=(8, 16)))}
    assert names == {"resolutions knn 8", "resolutions a fidelity 8"}
    says = "student is not measured at 16 px: it takes 8 px, not 16\n"
    assert capsys.readouterr().out == 2 * says  # for kNN and fidelity


def test_resolutions_without_options_are_multiples_of_the_students() -> None:
    sets = {"train": tokens_set(12, seed=12), "val": tokens_set(8, seed=13)}
    bare = replace(sets["val"], annotations=frozenset())
    student = predicting("student", "b")
    names = {score.name for score in scores_of("resolutions", [student], sets, Eval(k=(3,)))}
    assert names == {f"resolutions knn {size}" for size in (4, 8, 12, 16)}
    assert scores_of("resolutions", [student], {"train": bare, "val": bare}) == []
    baseline = replace(student, role="baseline")
    assert scores_of("resolutions", [baseline], sets) == []


@pytest.mark.dist
def test_two_ranks_find_the_same_agreement_and_resolutions(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    run(Forked(2, [str(SUPPORT / "agreeing_models.py"), str(file)]))
    first, second = json.loads(file.read_text())
    alone = measured()
    assert first == second and list(first) == list(alone)
    assert first == pytest.approx(alone, rel=1e-6)
