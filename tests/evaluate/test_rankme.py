"""The effective rank against a singular value decomposition, and at its bounds."""

from __future__ import annotations

import pytest
import torch
from memory_sets import MemoryImages, columns_model, scores_of
from torch import Tensor

from unic_ds.evaluate.rankme import EPSILON, effective_rank

CPU = torch.device("cpu")


def by_svd(x_NC: Tensor) -> float:
    """RankMe by its definition."""
    singular_C = torch.linalg.svdvals(x_NC.double())
    share_C = singular_C / singular_C.sum() + EPSILON
    return float(torch.exp(-(share_C * share_C.log()).sum()))


@pytest.mark.parametrize("rows, width", [(300, 24), (20, 60)])
def test_it_is_that_of_the_singular_values(rows: int, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    x_NC = 3 + torch.randn(rows, width, generator=g) * torch.logspace(0, -4, width)
    assert effective_rank(x_NC, CPU) == pytest.approx(by_svd(x_NC), rel=1e-6)


def test_bounds() -> None:
    line_NC = torch.arange(1.0, 65)[:, None] * torch.linspace(1, 2, 32)
    assert effective_rank(line_NC, CPU) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.eye(32).repeat(3, 1), CPU) == pytest.approx(32, rel=1e-4)
    assert effective_rank(torch.zeros(8, 4), CPU) == pytest.approx(1, abs=1e-3)


def test_it_needs_no_labels() -> None:
    images = MemoryImages(torch.eye(8).repeat(5, 1), torch.full((40,), -1), annotations=frozenset())
    (score,) = scores_of("rankme", [columns_model("m", slice(4))], {"train": images})
    assert score.value == pytest.approx(4, rel=1e-4)
    assert (score.unit, score.better) == ("", "")
    assert score.protocol == "rankme eps=1e-07 of at most 4, 40 training images 1 px"
