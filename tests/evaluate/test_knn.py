"""kNN against fp64 arithmetic, scikit-learn and faiss."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from memory_sets import MemoryImages, columns_model, scores_of
from planted_classes import Rows, knn, photographs, planted
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from unic_ds.config import Eval
from unic_ds.evaluate.knn import BLOCK, knn_accuracies, nearest
from unic_ds.evaluate.knn import Rows as KnnRows

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(
    "k, temperature", [(1, 0.07), (10, 0.07), (20, 1.0), (10, 0.001), (1000, 0.07)]
)
def test_knn_is_the_weighted_vote(k: int, temperature: float) -> None:
    rows = planted(150, 60, 24, 5, gap=2.5)
    train, val = (x.double().numpy() for x in (rows.train_NC, rows.val_NC))
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    val /= np.linalg.norm(val, axis=1, keepdims=True)
    hits = 0
    for row, label in zip(val, rows.val_label_N.tolist(), strict=True):
        cosine = train @ row
        votes = np.zeros(5)
        for i in np.argsort(-cosine)[:k]:
            votes[rows.train_label_N[i]] += np.exp((cosine[i] - 1) / temperature)
        hits += int(votes.argmax() == label)
    expected = pytest.approx(100 * hits / 60)
    assert knn(rows, k, temperature) == expected
    assert knn(rows, k, temperature, block=1000) == expected  # 6 queries, or 1, at a time
    assert knn(rows, k, temperature, block=64) == expected  # the bank in three blocks


def test_equal_votes_go_to_the_smallest_label() -> None:
    train_NC = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    label_N, val_NC = torch.tensor([9, 4, 2]), torch.tensor([[2.0, 0.0]])
    assert knn(Rows(train_NC, label_N, val_NC, torch.tensor([4])), k=2) == 100
    assert knn(Rows(train_NC, label_N, val_NC, torch.tensor([9])), k=2) == 0


@pytest.mark.parametrize("k", [1, 10, 200])
def test_knn_is_scikit_learn_s_on_real_features(demonstration: None, k: int) -> None:
    train, train_label, val, val_label = (x.numpy() for x in photographs())
    model = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine")
    score = 100 * model.fit(train, train_label).score(val, val_label)
    assert knn(photographs(), k=k) == pytest.approx(score, abs=1e-9)


def knn_of(rows: Rows, ks: tuple[int, ...] = (10,), **more: object) -> dict[int, float]:
    """Accuracies in % for several numbers of neighbours."""
    return knn_accuracies(KnnRows(*rows[:2]), KnnRows(*rows[2:]), ks=ks, **more)


@pytest.mark.parametrize("block", [BLOCK, 5000])
def test_majority_by_distance_is_scikit_learn_s_for_several_k(
    demonstration: None, block: int
) -> None:
    """Features with a large common part, which costs fp32 digits of their squared lengths."""
    rows = photographs()
    rows = rows._replace(train_NC=rows.train_NC + 30, val_NC=rows.val_NC + 30)
    found = knn_of(rows, (1, 10, 45), votes="majority", distance="l2", block=block)
    train, train_label, val, val_label = (x.numpy() for x in rows)
    for k, value in found.items():
        model = KNeighborsClassifier(k, algorithm="brute").fit(train.astype(float), train_label)
        score = 100 * model.score(val.astype(float), val_label)
        assert value == pytest.approx(score, abs=1e-9)
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_neighbours_are_faiss_s(distance: str) -> None:
    rows = planted(3000, 100, 64, 5, gap=2)
    bank_NC, query_QC = rows.train_NC, rows.val_NC
    found = nearest(KnnRows(bank_NC, torch.arange(3000)), query_QC, k=20, distance=distance)
    index = faiss.IndexFlatL2(64) if distance == "l2" else faiss.IndexFlatIP(64)
    of_unit_length = F.normalize if distance == "cosine" else lambda x: x
    index.add(of_unit_length(bank_NC).numpy())
    value_QK, place_QK = index.search(of_unit_length(query_QC).numpy(), 20)
    assert (found.label_QK.numpy() == place_QK).mean() > 0.999  # else equal but for rounding
    sign = -1 if distance == "l2" else 1
    assert np.allclose(found.near_QK, sign * value_QK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [BLOCK, 30, 7])
@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_of_equally_near_rows_the_first_count(block: int, distance: str) -> None:
    """Each row of the bank thrice; labels are places."""
    value_NC = torch.eye(4).repeat(3, 1)
    bank = KnnRows(value_NC, torch.arange(12))
    query_QC = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    found = nearest(bank, query_QC, k=5, block=block, distance=distance)
    assert found.label_QK.tolist() == [[1, 5, 9, 0, 2], [3, 7, 11, 0, 1]]
    found = nearest(bank, query_QC, k=2, block=block, distance=distance)
    assert found.label_QK.tolist() == [[1, 5], [3, 7]]


def test_perfect_features_are_all_right_and_random_ones_at_chance() -> None:
    for more in ({}, {"votes": "majority", "distance": "l2"}):
        assert knn_of(planted(400, 200, 32, 4, gap=40), **more) == {10: 100}
        (by_chance,) = knn_of(planted(400, 400, 32, 4, gap=0), **more).values()
        assert 17 < by_chance < 33  # 25, within four deviations


def test_the_protocol_of_each_paper_has_its_own_neighbours() -> None:
    rows = planted(60, 20, 8, 2, gap=40)
    sets = {"train": MemoryImages(*rows[:2]), "val": MemoryImages(*rows[2:])}
    said = {
        protocol: [
            (score.name, score.protocol)
            for score in scores_of("knn", [columns_model("m")], sets, Eval(protocol=protocol))
        ]
        for protocol in ("quick", "unic", "dinov2", "radio", "eupe")
    }
    used = "60/20 images 1 px"
    assert said["quick"] == [("knn", f"knn k=10 T=0.07 cosine {used}")]
    assert said["unic"] == said["radio"] == [("knn", f"knn k=20 T=0.07 cosine {used}")]
    assert said["eupe"] == [("knn", f"knn k=10 majority l2 {used}")]
    assert said["dinov2"] == [
        (f"knn k={k}", f"knn k={k} T=0.07 cosine {used}") for k in (10, 20, 100, 200)
    ]
