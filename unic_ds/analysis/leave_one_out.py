"""kNN accuracy of a set by itself: each image is judged by all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unic_ds.analysis.similarity import BLOCK, NEIGHBOURS, nearest_others
from unic_ds.evaluate.knn import Neighbours, vote

TEMPERATURE = 0.07
"""Of the votes exp(cosine / temperature) (arXiv 1805.01978)."""


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """Accuracy of each model on the images of one class, in %."""

    name: str
    images: int
    accuracy: dict[str, float]

    @property
    def best(self) -> list[str]:
        """The models with the highest accuracy."""
        most = max(self.accuracy.values())
        return [name for name, value in self.accuracy.items() if value == most]

    @property
    def spread(self) -> float:
        """Highest accuracy less the lowest."""
        return max(self.accuracy.values()) - min(self.accuracy.values())


def judged(label_N: Tensor) -> Tensor:
    """True for the images of classes that have another image; a label below 0 is none."""
    kept_N = label_N >= 0
    _, class_M, count_L = label_N[kept_N].unique(return_inverse=True, return_counts=True)
    kept_N[kept_N.clone()] = count_L[class_M] > 1
    return kept_N


def hits(x_NC: Tensor, label_N: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """True for the images (N) whose label the k nearest others by cosine vote for.

    Every image has a label. Votes as in `evaluate.knn`.
    """
    near = nearest_others(x_NC, k)
    found = Neighbours(near.near_QK, label_N[near.label_QK])
    return vote(found, TEMPERATURE, BLOCK) == label_N


def percent(hit_N: Tensor) -> float:
    """Part of True values in %."""
    return 100 * float(hit_N.double().mean())


def by_class(
    hit_N: Mapping[str, Tensor], label_N: Tensor, classes: tuple[str, ...]
) -> list[ClassRow]:
    """A row per class, those on which the models differ most first."""
    rows = []
    for label in label_N.unique().tolist():
        of_class_N = label_N == label
        accuracy = {name: percent(x_N[of_class_N]) for name, x_N in hit_N.items()}
        rows.append(ClassRow(name=classes[label], images=int(of_class_N.sum()), accuracy=accuracy))
    return sorted(rows, key=lambda row: -row.spread)


def side_by_side(features: Mapping[str, Tensor]) -> Tensor:
    """Features (N, C) of several models in one row, each standardised per channel.

    Those of a model are divided by the root of its width, so that each counts as much in a cosine.
    """
    parts = []
    for x_NC in features.values():
        z_NC = x_NC.double() - x_NC.double().mean(0)
        std_C = z_NC.square().mean(0).sqrt()
        z_NC = torch.where(std_C > 0, z_NC / std_C.clamp(min=1e-12), 0.0)
        parts.append(z_NC / x_NC.shape[1] ** 0.5)
    return torch.cat(parts, 1).float()
