"""Nearest training images of some validation images, from features that an evaluation has taken."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from unic_ds import dist, rng
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import FILLER, ImageSet, Model
from unic_ds.evaluate.knn import Rows, nearest
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

Nearest = dict[int, list[int]]
"""Place of a validation image -> places of its nearest training images, nearest first."""


def chosen(images: ImageSet, count: int, seed: int) -> list[int]:
    """Seeded places of `count` images, or of all; the same on every rank and at every start."""
    bits_N = rng.random_bits(seed, "pictures", 1, np.arange(len(images)))[:, 0]
    return [int(i) for i in np.argsort(bits_N, kind="stable")[:count]]


def has_features(model: Model, data: EvalData) -> bool:
    """True if an evaluator has asked for the model's features of training and validation images."""
    return all((name, model.name) in data.extracted for name in ("train", "val"))


def find(model: Model, data: EvalData, query_places: Iterable[int], *, k: int) -> Nearest:
    """The k nearest training images of each query by the cosine of CLS features.

    An image that could not be read is left out. Every rank calls it.
    """
    train, val = (data.extracted[name, model.name] for name in ("train", "val"))
    mine_R = torch.isin(val.place_R, torch.tensor(list(query_places)))
    with raised_on_all_ranks("the neighbours of pictures", "use --probe.pictures 0"):
        bank = Rows(train.cls[model.name].to(data.device), train.place_R.to(data.device))
        query_QC = val.cls[model.name][mine_R].to(data.device)
    found_QK = nearest(bank, query_QC, k=k).label_QK.tolist()
    mine = dict(zip(val.place_R[mine_R].tolist(), found_QK, strict=True))
    return {at: near for part in dist.all_gather_objects(mine) for at, near in part.items()}


def thumbnails(images: ImageSet, places: Iterable[int], side: int) -> dict[int, NDArray[np.uint8]]:
    """Central squares (side, side, 3) of the images that can be read; every rank calls it."""
    found: dict[int, NDArray[np.uint8]] = {}
    with raised_on_all_ranks("the pictures of neighbours", "use --probe.pictures 0"):
        for batch in images.batches((side,), np.array(sorted(places), dtype=np.int64)):
            image_BHW3 = batch.images[side].permute(0, 2, 3, 1).cpu().numpy()
            pairs = zip(batch.place_B.tolist(), image_BHW3, strict=True)
            found |= {place: image_HW3 for place, image_HW3 in pairs if place != FILLER}
    return {at: image for part in dist.all_gather_objects(found) for at, image in part.items()}
