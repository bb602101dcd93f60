"""Transfer: the linear probe's accuracy on each set, and means of them."""

from __future__ import annotations

import pytest
import torch
from memory_sets import MemoryImages, columns_model, scores_of
from planted_classes import planted

from unic_ds.config import Eval

SETS = ("cells", "cog/one", "cog/two")


@pytest.mark.parametrize(("task", "classifier"), [("transfer", "linear"), ("transfer_knn", "knn")])
def test_each_set_has_the_classifier_s_accuracy_and_means_are_unweighted(
    task: str, classifier: str
) -> None:
    models = [columns_model("narrow", slice(4)), columns_model("wide")]
    sets, alone = {}, {}
    for seed, name in enumerate(SETS):
        rows = planted(60 + 30 * seed, 40, 16, 3, gap=2.5, seed=seed)
        sides = {"train": MemoryImages(*rows[:2]), "val": MemoryImages(*rows[2:])}
        sets |= {f"{name}/{side}": images for side, images in sides.items()}
        for score in scores_of(classifier, models, sides):
            alone[score.model, name] = score
    scores = {(s.model, s.name): s for s in scores_of(task, models, sets)}
    for model in ("narrow", "wide"):
        values = [alone[model, name].value for name in SETS]
        for name in SETS:
            score = scores[model, f"{task} {name}"]
            assert score.value == alone[model, name].value
            assert score.protocol == f"{task} {name}: {alone[model, name].protocol}"
        assert scores[model, f"{task} mean"].value == pytest.approx(sum(values) / 3)
        assert scores[model, f"{task} cog mean"].value == pytest.approx(sum(values[1:]) / 2)
        assert len(set(values)) == 3 and min(values) > 100 / 3 + 5
    assert len(scores) == 2 * 5
    assert scores["wide", f"{task} mean"].protocol == (
        f"{task} mean: unweighted, of cells, cog/one, cog/two"
    )


def test_perfect_features_are_right_and_random_ones_at_chance() -> None:
    label_N = torch.arange(400) % 4
    g = torch.Generator().manual_seed(0)
    value_NC = torch.cat([torch.eye(4)[label_N], torch.randn(400, 2, generator=g)], 1)
    images = MemoryImages(value_NC, label_N)
    models = [columns_model("perfect", slice(4)), columns_model("random", slice(4, 6))]
    scores = scores_of("transfer", models, {"a/train": images, "a/val": images})
    value = {(s.model, s.name): s.value for s in scores}
    assert value["perfect", "transfer a"] == value["perfect", "transfer mean"] == 100
    assert 15 < value["random", "transfer a"] < 40


def test_a_published_probe_s_second_number_is_named_after_the_set() -> None:
    label_N = torch.arange(60) % 3
    images = MemoryImages(torch.eye(3)[label_N], label_N)
    sets = {"a/train": images, "a/val": images}
    scores = scores_of("transfer", [columns_model("m")], sets, Eval(protocol="radio"))
    rows = ["transfer a", "transfer a per class", "transfer mean"]
    assert {score.name: score.value for score in scores} == dict.fromkeys(rows, 100)


def test_several_numbers_of_neighbours_have_a_mean_each() -> None:
    label_N = torch.arange(60) % 3
    images = MemoryImages(torch.eye(3)[label_N], label_N)
    sets = {f"{name}/{side}": images for name in "ab" for side in ("train", "val")}
    scores = scores_of("transfer_knn", [columns_model("m")], sets, Eval(k=(5, 9)))
    names = ["transfer_knn a k=5", "transfer_knn a k=9", "transfer_knn b k=5", "transfer_knn b k=9"]
    assert [score.name for score in scores] == [
        *names,
        "transfer_knn mean k=5",
        "transfer_knn mean k=9",
    ]
    assert {score.value for score in scores} == {100.0}
