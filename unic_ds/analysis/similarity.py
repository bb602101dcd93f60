"""Likeness of the features of two models on the same images: CKA and mutual nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds.evaluate.fidelity import CrossSums, unbiased_hsic
from unic_ds.evaluate.knn import Neighbours, largest
from unic_ds.evaluate.products import block_on, product

NEIGHBOURS = 10
"""Nearest images that are compared, and that vote."""
BLOCK = 2**24
"""Similarities that are held at once."""


def linear_cka(features: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """Linear CKA (arXiv 1905.00414) of each pair of models' features (N, C) by unbiased HSIC.

    1 for features that differ by a rotation, a shift or a factor; about 0 for independent ones, of
    which it may be negative. NaN for fewer than 4 tokens, or constant features.
    """
    # HSIC does not depend on the mean, but its rounding does.
    centred = {name: (x_NC - x_NC.double().mean(0)).float() for name, x_NC in features.items()}
    alone = {name: unbiased_hsic(cross_sums(x_NC, x_NC)) for name, x_NC in centred.items()}
    found = {}
    for first, second in combinations(features, 2):
        both = unbiased_hsic(cross_sums(centred[first], centred[second]))
        scale = alone[first] * alone[second]
        found[first, second] = both / math.sqrt(scale) if scale > 0 else math.nan
    return found


def cross_sums(x_NC: Tensor, y_ND: Tensor) -> CrossSums:
    """Sums of two models' centred fp32 features of the same N tokens, fp64 but for the product."""
    cross_CD = product(x_NC.T, y_ND.T).double()
    x_NC, y_ND = x_NC.double(), y_ND.double()
    square_xN, square_yN = (z_NC.square().sum(1) for z_NC in (x_NC, y_ND))
    return CrossSums(
        cross_CD=cross_CD,
        sum_xC=x_NC.sum(0),
        sum_yD=y_ND.sum(0),
        scaled_xC=square_yN @ x_NC,
        scaled_yD=square_xN @ y_ND,
        square_x=square_xN.sum(),
        square_y=square_yN.sum(),
        square_xy=square_xN @ square_yN,
        tokens=float(len(x_NC)),
    )


def nearest_others(x_NC: Tensor, k: int = NEIGHBOURS, *, block: int = BLOCK) -> Neighbours:
    """The k other images that are nearest to each by cosine, with places in place of labels."""
    x_NC = F.normalize(x_NC.float())
    k = min(k, len(x_NC) - 1)
    rows = max(1, block_on(x_NC.device, block) // len(x_NC))
    found = []
    for at in range(0, len(x_NC), rows):
        near_QN = product(x_NC[at : at + rows], x_NC)
        place_Q = torch.arange(len(near_QN), device=x_NC.device)
        near_QN[place_Q, at + place_Q] = -torch.inf
        found.append(largest(near_QN, k))
    return Neighbours(*map(torch.cat, zip(*found, strict=True)))


def mutual_neighbours(first: Neighbours, second: Neighbours) -> float:
    """Mean part of the nearest images that two models share (Huh et al., arXiv 2405.07987)."""
    same_NKK = first.label_QK[:, :, None] == second.label_QK[:, None]
    return float(same_NKK.any(2).float().mean())
