"""Features with planted classes or of photographs, and the accuracies of both probes on them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unic_ds import demo
from unic_ds.evaluate.features import FeatureSet, pixels
from unic_ds.evaluate.knn import BLOCK, knn_accuracies
from unic_ds.evaluate.knn import Rows as KnnRows
from unic_ds.evaluate.linear_grid import fit_grid
from unic_ds.evaluate.probe import accuracy


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


@functools.cache
def photographs() -> Rows:
    """Pixels and classes of the demonstration's images: 1600 to train on, 1024 unseen."""
    files = sorted((demo.root() / "images").glob("*/*.jpg"))
    classes = sorted({file.parent.name for file in files})
    image_N1HW = torch.stack([thumbnail(file) for file in files])
    value_NC = pixels(image_N1HW)
    label_N = torch.tensor([classes.index(file.parent.name) for file in files])
    order_N = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    train, val = order_N.split([1600, len(files) - 1600])
    return Rows(value_NC[train], label_N[train], value_NC[val], label_N[val])


def thumbnail(file: Path) -> Tensor:
    """A photograph in grey, 64 x 64."""
    with Image.open(file) as image:
        image.draft("L", (80, 80))
        return torch.from_numpy(np.array(image.convert("L").resize((64, 64))))[None]


def knn(rows: Rows, k: int = 10, temperature: float = 0.07, block: int = BLOCK) -> float:
    """kNN accuracy of one model in %."""
    bank, query = KnnRows(*rows[:2]), KnnRows(*rows[2:])
    return knn_accuracies(bank, query, ks=(k,), temperature=temperature, block=block)[k]


def linear(rows: Rows, seed: int = 0, device: str = "cpu") -> float:
    """Linear accuracy of one model in %."""
    train, val = (
        FeatureSet({"m": x_NC}, torch.arange(len(x_NC)), label_N)
        for x_NC, label_N in (rows[:2], rows[2:])
    )
    return accuracy(fit_grid(train, seed=seed, device=torch.device(device))["m"], val, "m").top1
