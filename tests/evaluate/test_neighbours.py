"""Neighbours for pictures, against a plain search in the features that an evaluator took."""

from __future__ import annotations

import torch
from memory_sets import MemoryImages, columns_model

from unic_ds.config import Eval
from unic_ds.evaluate import neighbours
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Model

CPU = torch.device("cpu")


def made(models: list[Model], seed: int = 0) -> EvalData:
    """Features of 40 training and 9 validation images by some models."""
    g = torch.Generator().manual_seed(seed)
    sets = {
        name: MemoryImages(torch.randn(count, 6, generator=g), torch.full((count,), -1))
        for name, count in (("train", 40), ("val", 9))
    }
    data = EvalData(sets, options=Eval(), seed=0, device=CPU)
    data.features(models)
    return data


def test_they_are_those_of_highest_cosine_and_nothing_is_encoded() -> None:
    models = [columns_model("a"), columns_model("b", slice(2, 5))]
    data = made(models)
    extracted = dict(data.extracted)
    for model, columns in zip(models, (slice(None), slice(2, 5)), strict=True):
        found = neighbours.find(model, data, [7, 2, 5], k=4)
        train_NC, val_NC = (data.images(s).value_NC[:, columns] for s in ("train", "val"))  # type: ignore[attr-defined]
        cosine_QN = torch.cosine_similarity(val_NC[:, None], train_NC[None], dim=-1)
        assert found == {at: cosine_QN[at].topk(4).indices.tolist() for at in (2, 5, 7)}
    assert data.extracted == extracted
    assert not neighbours.has_features(columns_model("c"), data)


def test_images_of_places_are_read_once_each() -> None:
    image_N3HW = torch.arange(6 * 3 * 4, dtype=torch.uint8).view(6, 3, 2, 2)
    images = MemoryImages(image_N3HW, torch.zeros(6, dtype=torch.int64), batch=2)
    found = neighbours.thumbnails(images, {4, 1, 3}, 2)
    assert found.keys() == {1, 3, 4}
    for place, image_HW3 in found.items():
        assert (image_HW3 == image_N3HW[place].permute(1, 2, 0).numpy()).all()


def test_the_same_images_are_chosen_at_every_start() -> None:
    images = MemoryImages(torch.zeros(30, 1), torch.zeros(30))
    chosen = neighbours.chosen(images, 6, 5)
    assert chosen == neighbours.chosen(images, 6, 5) != neighbours.chosen(images, 6, 4)
    assert len(set(chosen)) == 6 and set(neighbours.chosen(images, 99, 5)) == set(range(30))
