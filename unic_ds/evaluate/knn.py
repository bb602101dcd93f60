"""Weighted k nearest neighbours under the cosine (arXiv 1805.01978, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor


def knn(
    train_NC: Tensor,
    train_label_N: Tensor,
    val_NC: Tensor,
    val_label_N: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
) -> Iterator[tuple[str, float]]:
    """Yield ("knn", accuracy in %): the k nearest training rows vote by exp(cosine / temperature).

    Fewer training rows than k all vote. Runs on the CPU in chunks: no N x N memory.
    """

    def votes(distance_NK: NDArray[np.float32]) -> NDArray[np.float32]:
        # Relative to the nearest: the same vote, which at a small T neither overflows nor vanishes.
        return np.exp((distance_NK.min(1, keepdims=True) - distance_NK) / temperature)

    model = KNeighborsClassifier(
        min(k, len(train_NC)), weights=votes, metric="cosine", algorithm="brute"
    )
    model.fit(train_NC.float().cpu().numpy(), train_label_N.cpu().numpy())
    yield "knn", 100 * float(model.score(val_NC.float().cpu().numpy(), val_label_N.cpu().numpy()))
