"""Features with planted classes, and the accuracies of both probes on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unic_ds.evaluate.features import FeatureSet
from unic_ds.evaluate.knn import BLOCK, knn_accuracy
from unic_ds.evaluate.knn import Rows as KnnRows
from unic_ds.evaluate.linear import linear_accuracies


class Rows(NamedTuple):
    train_NC: Tensor
    train_label_N: Tensor
    val_NC: Tensor
    val_label_N: Tensor


def planted(train: int, val: int, width: int, classes: int, gap: float, seed: int = 0) -> Rows:
    """Gaussian classes, centres `gap` standard deviations long, in channels of different scale."""
    g = torch.Generator().manual_seed(seed)
    label_N = torch.randint(classes, (train + val,), generator=g)
    centre = torch.randn(classes, width, generator=g) * gap / width**0.5
    x_NC = centre[label_N] + torch.randn(train + val, width, generator=g)
    x_NC = x_NC * torch.logspace(0, -3, width)
    return Rows(x_NC[:train], label_N[:train], x_NC[train:], label_N[train:])


def knn(rows: Rows, k: int = 10, temperature: float = 0.07, block: int = BLOCK) -> float:
    """kNN accuracy of one model in %."""
    bank, query = KnnRows(*rows[:2]), KnnRows(*rows[2:])
    return knn_accuracy(bank, query, k=k, temperature=temperature, block=block)


def linear(rows: Rows, seed: int = 0, device: str = "cpu") -> float:
    """Linear accuracy of one model in %."""
    train, val = (
        FeatureSet({"m": x_NC}, torch.arange(len(x_NC)), label_N)
        for x_NC, label_N in (rows[:2], rows[2:])
    )
    return linear_accuracies(train, val, seed=seed, device=torch.device(device))["m"]
