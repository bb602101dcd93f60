"""Retrieval against scikit-learn, torchmetrics and cases with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from memory_sets import MemoryImages, columns_model, scores_of
from planted_classes import Rows, planted
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from unic_ds.evaluate.retrieval import RECALL_AT, Labelled, retrieve

pytestmark = pytest.mark.filterwarnings("error")


def found(rows: Rows, **more: int) -> tuple[float, list[float]]:
    """Mean average precision and recalls of one rank."""
    gallery, query = (
        Labelled(F.normalize(x_NC), label_N) for x_NC, label_N in (rows[:2], rows[2:])
    )
    return retrieve(gallery, query, **more)


def test_average_precision_is_scikit_learn_s() -> None:
    rows = planted(200, 40, 16, 5, gap=2)
    rows.train_NC[:50] = rows.train_NC[50:100]  # equally near images
    mean, recalls = found(rows)
    cosine_QN = F.normalize(rows.val_NC) @ F.normalize(rows.train_NC).T
    expected = [
        average_precision_score((rows.train_label_N == label).numpy(), row.numpy())
        for row, label in zip(cosine_QN, rows.val_label_N, strict=True)
    ]
    assert mean == pytest.approx(100 * np.mean(expected), rel=1e-6)
    again, recalls_again = found(rows, block=450)  # two queries at a time
    assert again == pytest.approx(mean, rel=1e-6) and recalls_again == recalls


def test_precision_and_recall_are_torchmetrics_s() -> None:
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

    rows = planted(120, 30, 16, 6, gap=2.5)
    # torchmetrics counts no positive whose score is not positive.
    cosine_QN = 1 + F.normalize(rows.val_NC.double()) @ F.normalize(rows.train_NC.double()).T
    positive_QN = rows.val_label_N[:, None] == rows.train_label_N
    of_QN = torch.arange(30)[:, None].expand_as(cosine_QN)
    mean, recalls = found(rows)
    flat = [x.flatten() for x in (cosine_QN, positive_QN, of_QN)]
    assert mean == pytest.approx(100 * float(RetrievalMAP()(*flat[:2], indexes=flat[2])))
    for k, recall in zip(RECALL_AT, recalls, strict=True):
        hit_rate = float(RetrievalHitRate(top_k=k)(*flat[:2], indexes=flat[2]))
        assert recall == pytest.approx(100 * hit_rate)
    assert 10 < recalls[0] < recalls[-1] <= 100


def test_a_case_by_hand() -> None:
    """The positives of the first query are its first and fourth, of the second its second."""
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.4], [0.8, 0.6], [0.6, 0.8]])
    label_N = torch.tensor([0, 1, 2, 0])
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    mean, recalls = found(Rows(gallery, label_N, query, torch.tensor([0, 1])))
    assert mean == pytest.approx(100 * ((1 + 2 / 4) / 2 + 1 / 2) / 2)
    assert recalls == [50, 100, 100]


def test_constant_features_have_the_precision_of_chance() -> None:
    train_NC, label_N = torch.ones(80, 4), torch.arange(80) % 4
    mean, recalls = found(Rows(train_NC, label_N, train_NC[:8], label_N[:8]))
    assert mean == pytest.approx(25) and recalls == [0, 0, 0]


def test_queries_without_a_positive_are_left_out_and_counted() -> None:
    train = MemoryImages(torch.eye(3).repeat(4, 1), torch.arange(12) % 3)
    val = MemoryImages(torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 7]))
    scores = scores_of("retrieval", [columns_model("m")], {"train": train, "val": val})
    rows = ["retrieval mAP", *(f"retrieval R@{k}" for k in RECALL_AT)]
    assert {score.name: score.value for score in scores} == dict.fromkeys(rows, 100)
    assert scores[0].protocol == (
        "retrieval mAP cosine, queries val, gallery train, 1 queries without a positive left out,"
        " 12/3 images 1 px"
    )
    val.label_N[:] = 9
    with pytest.raises(ValueError, match="no validation image has the class of a training image"):
        scores_of("retrieval", [columns_model("m")], {"train": train, "val": val})
