"""Held-out R^2, greedy selection and a whole comparison, with answers that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unic_ds.analysis import comparison, selection
from unic_ds.analysis.comparison import Labels
from unic_ds.analysis.coverage import COMPONENTS, Coverage


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cls_of(**rows: Tensor) -> dict[str, dict[str, Tensor]]:
    return {name: {"cls": x_NC[:, None]} for name, x_NC in rows.items()}


def test_a_rotated_copy_is_explained_and_noise_is_not() -> None:
    x_NC = noise(600, 24) * torch.linspace(0.2, 4, 24)
    turned_NC = 3 * x_NC @ torch.linalg.qr(noise(24, 24, seed=1)).Q + 5
    found = Coverage(cls_of(x=x_NC, turned=turned_NC, noise=noise(600, 16, seed=2)))
    x = frozenset({"x"})
    assert found.r2(x, "turned", "cls") == pytest.approx(1, abs=1e-4)
    assert abs(found.r2(x, "noise", "cls")) < 0.02
    assert found.of(["x"]) == pytest.approx(2 / 3, abs=0.01)
    assert found.of(["x", "noise"]) == pytest.approx(1, abs=1e-4) and found.of([]) == 0


def test_half_of_the_signal_is_half_of_the_variance_on_images_that_did_not_fit() -> None:
    """y = x + noise of the same variance: a regression can know half of it."""
    x_NC = noise(4000, 8)
    y_NC = x_NC + noise(4000, 8, seed=1)
    found = Coverage(cls_of(x=x_NC, y=y_NC))
    for source, target in (("x", "y"), ("y", "x")):
        assert found.r2(frozenset({source}), target, "cls") == pytest.approx(0.5, abs=0.03)


def test_wide_features_are_reduced_to_their_components() -> None:
    latent_NC = noise(500, 20)
    wide = {n: latent_NC @ noise(20, COMPONENTS + 44, seed=i) for i, n in ((1, "a"), (2, "b"))}
    found = Coverage(cls_of(**wide))
    assert found.halves["cls"]["a"].fit_RZ.shape == (250, COMPONENTS)
    assert found.r2(frozenset({"a"}), "b", "cls") == pytest.approx(1, abs=1e-3)


def test_tokens_of_an_image_stay_in_one_half() -> None:
    """Four equal tokens of noise: if they were in both halves, a regression would know them."""
    a_NMC, b_NMC = (noise(60, 1, 40, seed=i).expand(60, 4, 40) for i in (0, 1))
    found = Coverage({"a": {"patch": a_NMC}, "b": {"patch": b_NMC}})
    assert found.r2(frozenset({"a"}), "b", "patch") < 0.1


PARTS = cls_of(
    a=noise(400, 12),
    b=noise(400, 12, seed=1),
    both=torch.cat([noise(400, 12), noise(400, 12, seed=1)], 1),
)


def test_the_concatenation_of_two_others_is_chosen_first() -> None:
    costs = {"a": 1.0, "b": 2.0, "both": 5.0}
    found = selection.select(PARTS, costs)
    assert found.chosen[0] == "both" and set(found.chosen) == {"a", "b", "both"}
    assert found.steps[0].coverage == pytest.approx(1, abs=1e-3)
    assert [step.cost for step in found.steps][::2] == [5.0, 8.0] and found.left_out == {}


def test_a_budget_is_kept_and_what_is_left_out_is_told() -> None:
    costs = {"a": 1.0, "b": 2.0, "both": 5.0}
    found = selection.select(PARTS, costs, budget=3.0)
    assert set(found.chosen) == {"a", "b"} and found.steps[-1].cost == 3.0
    assert found.left_out == {"both": "costs 5 GFLOPs an image, but 0 of 3 are left"}
    assert selection.select(PARTS, costs, budget=5.5).chosen == ["both"]
    with pytest.raises(ValueError, match=r"--budget 0\.5 GFLOPs fits no teacher: .* 'a', costs 1"):
        selection.select(PARTS, costs, budget=0.5)


def test_a_comparison_tells_that_a_copy_is_not_needed() -> None:
    """Without a copy the rest covers all; without the other teacher classes are lost."""
    label_N = torch.arange(120) % 4
    first_NC = 3 * torch.eye(2)[label_N % 2] + 0.1 * noise(120, 2)
    other_NC = 3 * torch.eye(2)[label_N // 2] + 0.1 * noise(120, 2, seed=1)
    rows = {"first": first_NC, "copy": 2 * first_NC, "other": other_NC}
    features = {
        name: {"cls": x_NC[:, None], "patch": x_NC[:, None].repeat(1, 4, 1)}
        for name, x_NC in rows.items()
    }
    labels = Labels(label_N, ("p", "q", "r", "s"))
    found = comparison.compare(features, labels, dict.fromkeys(rows, 1.0), budget=3.0)
    assert found.labelled and found.labelled.images == 120
    assert all(40 < value < 60 for value in found.labelled.accuracy.values())
    assert found.knn == 100.0 and found.coverage == 1.0
    without = {row.teacher: row for row in found.without}
    for name in ("first", "copy"):
        assert without[name].coverage == pytest.approx(1, abs=1e-3) and without[name].knn == 100.0
    assert without["other"].coverage < 0.8 and without["other"].knn < 60
    pairs = {(pair.first, pair.second, pair.kind): pair for pair in found.pairs}
    assert len(pairs) == 6 and pairs["first", "copy", "patch"].mutual_knn == 1.0
    assert pairs["first", "copy", "cls"].cka == pytest.approx(1, abs=1e-5)
    none = Labels(-torch.ones_like(label_N), ())
    unlabelled = comparison.compare(features, none, dict.fromkeys(rows, 1.0))
    assert unlabelled.labelled is None and unlabelled.knn is None
