"""Figures of features whose spectrum, norms and angles are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from unic_ds.analysis.spectrum import powers_of_two, spectrum_of

VARIANCE = np.array([6, 2, 1.5, 0.5])


def test_uncorrelated_channels_have_the_figures_of_their_variances() -> None:
    """Columns of a Hadamard matrix are orthogonal, of mean 0 and variance 1."""
    column_NC = torch.tensor(hadamard(64)[:, 1:5] * np.sqrt(VARIANCE))
    turn_CC = torch.linalg.qr(torch.randn(4, 4, generator=torch.manual_seed(0)).double()).Q
    for x_NC in (column_NC, column_NC @ turn_CC):
        found = spectrum_of(x_NC)
        assert found.width == 4 and found.components == 3
        assert found.norm_mean == pytest.approx(math.sqrt(10)) and found.norm_std < 1e-6
        assert found.participation == pytest.approx(100 / np.square(VARIANCE).sum())
        share_C = np.sqrt(VARIANCE) / np.sqrt(VARIANCE).sum()
        assert found.rankme == pytest.approx(math.exp(-(share_C * np.log(share_C)).sum()))
        assert found.cumulative == pytest.approx((0.6, 0.8, 1.0))


def test_dispersion_is_the_mean_squared_angle_to_the_mean_direction() -> None:
    angle_N = torch.tensor([0.3, -0.3, 0.1, -0.1])
    length_N = torch.tensor([1.0, 5.0, 2.0, 0.1])
    x_NC = length_N[:, None] * torch.stack([angle_N.cos(), angle_N.sin()], 1)
    assert spectrum_of(x_NC).dispersion == pytest.approx((0.09 + 0.01) / 2, rel=1e-5)


def test_constant_features_have_no_variance() -> None:
    found = spectrum_of(torch.ones(8, 3))
    assert found.participation == 0 and found.dispersion == pytest.approx(0, abs=1e-9)
    assert found.cumulative == (0.0, 0.0, 0.0) and found.rankme == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("width, places", [(1, [0]), (2, [0, 1]), (6, [0, 1, 3, 5])])
def test_places_of_the_curve_end_at_the_last_component(width: int, places: list[int]) -> None:
    assert powers_of_two(width) == places
