"""Norms, spectrum and angular dispersion of the features of one model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds.evaluate.rankme import entropy_rank
from unic_ds.losses.terms import angle

SHARE = 0.9
"""Part of the variance that `Spectrum.components` explain."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Figures of features in `width` channels."""

    width: int
    norm_mean: float
    norm_std: float
    """Of the features' L2 norms, as the mean."""
    rankme: float
    """exp of the entropy of the singular values, not centred (RankMe, arXiv 2210.02885)."""
    participation: float
    """(sum of variances)^2 / sum of squared variances, of the principal components."""
    components: int
    """Principal components that have `SHARE` of the variance."""
    dispersion: float
    """Mean squared angle to the mean direction, rad^2 (C-RADIOv4, arXiv 2601.17237)."""
    cumulative: tuple[float, ...]
    """Part of the variance that the first 1, 2, 4, ... components have."""


def spectrum_of(x_NC: Tensor) -> Spectrum:
    """The figures of N features; sums are fp64."""
    count, width = x_NC.shape
    x_NC = x_NC.double()
    norm_N, mean_C = x_NC.norm(dim=1), x_NC.mean(0)
    square_CC = x_NC.T @ x_NC
    singular_C = torch.linalg.eigvalsh(square_CC).flip(0)[:count]
    centred_CC = square_CC / count - torch.outer(mean_C, mean_C)
    variance_C = torch.linalg.eigvalsh(centred_CC).flip(0).clamp(min=0)
    tiny = torch.finfo(torch.float64).tiny
    share_C = variance_C / variance_C.sum().clamp(min=tiny)
    sum_C = share_C.cumsum(0)
    return Spectrum(
        width=width,
        norm_mean=float(norm_N.mean()),
        norm_std=float(norm_N.std(unbiased=False)),
        rankme=entropy_rank(singular_C),
        participation=float(1 / share_C.square().sum().clamp(min=tiny)) if sum_C[-1] > 0 else 0.0,
        components=min(width, int((sum_C < SHARE).sum()) + 1),
        dispersion=dispersion_of(x_NC),
        cumulative=tuple(float(sum_C[at]) for at in powers_of_two(width)),
    )


def dispersion_of(x_NC: Tensor) -> float:
    """Mean squared angle of features to their mean direction, in rad^2."""
    direction_C = F.normalize(x_NC, dim=-1).sum(0)
    return float(angle(x_NC, direction_C).square().mean())


def powers_of_two(width: int) -> list[int]:
    """0-based places of the components 1, 2, 4, ... and of the last."""
    places = [2**i - 1 for i in range(width.bit_length()) if 2**i < width]
    return [*places, width - 1]
