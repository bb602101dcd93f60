"""Linear probes against scikit-learn's regressions and planted classes."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from planted_classes import Rows, knn, linear, photographs, planted
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy

from unic_ds.evaluate import softmax
from unic_ds.evaluate.linear_grid import STRENGTHS, standardised
from unic_ds.evaluate.probe import Split

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("classes", [2, 4])
def test_fits_are_the_fp64_solutions_on_real_features(demonstration: None, classes: int) -> None:
    """All strengths at once, beside scikit-learn's, each for as long as it takes."""
    rows, cpu = photographs(), torch.device("cpu")
    kept_N, tested_N = rows.train_label_N < classes, rows.val_label_N < classes
    train_NC, class_N = rows.train_NC[kept_N], rows.train_label_N[kept_N]
    prepare, train = standardised("pixels", train_NC, class_N, cpu)
    val = Split(prepare(rows.val_NC[tested_N]), rows.val_label_N[tested_N])
    x_NC, held_NC = (split.x_RD[:, :-1].double() for split in (train, val))
    scaler = StandardScaler().fit(train_NC.double())
    assert np.allclose(x_NC[:9], scaler.transform(train_NC[:9]), atol=1e-5)
    weights = softmax.fit([train], [STRENGTHS], classes)
    points = softmax.accuracies([val], weights, classes)
    for strength, weight_DL, value in zip(
        STRENGTHS, weights[0].view(-1, x_NC.shape[1] + 1, classes).double(), points[0], strict=True
    ):
        best = LogisticRegression(C=strength, max_iter=20_000, tol=1e-8).fit(x_NC, train.class_R)
        assert value == pytest.approx(100 * best.score(held_NC, val.class_R), abs=0.1 + 1e-9)
        coef_LC, bias_L = (torch.from_numpy(w) for w in (best.coef_, best.intercept_))
        if classes == 2:
            coef_LC, bias_L = (torch.cat([-w / 2, w / 2]) for w in (coef_LC, bias_L))
        least = objective(coef_LC, bias_L, x_NC, train.class_R, strength)
        found = objective(weight_DL[:-1].T, weight_DL[-1], x_NC, train.class_R, strength)
        assert found / least - 1 < 1e-5


def objective(
    coef_LC: Tensor, bias_L: Tensor, x_NC: Tensor, class_N: Tensor, strength: float
) -> float:
    """The penalised loss that a logistic regression minimises, in fp64."""
    loss = cross_entropy(x_NC @ coef_LC.T + bias_L, class_N, reduction="sum")
    both = 2 if len(bias_L) == 2 else 1  # two classes have one weight vector
    return float(loss + both * coef_LC.square().sum() / (2 * strength))


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [2, 10])
def test_a_gpu_finds_the_accuracies_of_the_cpu(classes: int) -> None:
    rows = planted(2000, 1000, 256, classes, gap=4)
    on_gpu = Rows(*(x.cuda() for x in rows))
    assert knn(on_gpu) == knn(on_gpu) == pytest.approx(knn(rows), abs=0.1)
    assert linear(rows, device="cuda") == linear(rows, device="cuda")
    assert linear(rows, device="cuda") == pytest.approx(linear(rows), abs=0.1)


@pytest.mark.gpu
def test_probes_that_do_not_fit_the_gpu_name_the_remedy() -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    says = "out of GPU memory in the linear probe of 'm'; lower --eval.max_train"
    try:
        with pytest.raises(RuntimeError, match=says):
            linear(planted(2000, 10, 2048, 3, gap=4), device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_linear_finds_planted_classes() -> None:
    assert linear(planted(400, 200, 32, 4, gap=12)) > 97
    assert 10 < linear(planted(400, 200, 32, 4, gap=0)) < 40  # chance is 25


def test_linear_is_seeded_and_takes_awkward_sets() -> None:
    rows = planted(60, 40, 16, 3, gap=3)
    assert linear(rows, seed=5) == linear(rows, seed=5)
    dead = rows.train_NC.clone()
    dead[:, 3] = 7.1  # a dead channel
    alone = rows.train_label_N.clone()
    alone[0] = 9  # a class of one image cannot be held out
    assert linear(rows._replace(train_NC=dead, train_label_N=alone)) > 33
    two = Rows(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 1]))
    assert linear(two) == 100
    with pytest.raises(ValueError, match="two classes"):
        linear(rows._replace(train_label_N=torch.zeros(60, dtype=torch.long)))


def test_linear_in_seconds_at_the_quickstart_size() -> None:
    rows = planted(1968, 656, 1280, 4, gap=2)
    began = time.process_time()
    assert linear(rows) > 30
    assert time.process_time() - began < 60  # CPU seconds; a quiet machine needs about 1
