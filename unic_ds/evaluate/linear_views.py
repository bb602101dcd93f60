"""Features of augmented views for a linear probe, also with the mean of the patch tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unic_ds.evaluate.extraction import encode_cls
from unic_ds.evaluate.features import (
    FILLER,
    AugmentedImages,
    FeatureSet,
    Model,
    ModelOutput,
    Outputs,
)
from unic_ds.evaluate.linear_rates import EpochFeatures
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

WITH_PATCHES = ", CLS and mean patches"
"""End of a model's name if its features are both."""


def with_patches(model: Model) -> Model:
    """A model whose CLS features are followed by the mean of its patch tokens, if it has any."""
    if "patch" not in model.outputs:
        return model

    def encode(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        found = model.encode(image_B3HW, frozenset({"cls", "patch"}))
        assert found.cls_BC is not None and found.patch_BNC is not None
        mean_BC = found.patch_BNC.float().mean(1)
        return Outputs(torch.cat([found.cls_BC.float(), mean_BC], 1))

    return replace(
        model,
        name=model.name + WITH_PATCHES,
        outputs=frozenset({"cls"}),
        encode=encode,
        identity=model.identity and model.identity + WITH_PATCHES,
    )


def epoch_features(
    models: Sequence[Model], images: AugmentedImages, train: FeatureSet, *, seed: int
) -> EpochFeatures:
    """Features of the augmented views that `images` shows in an epoch, for the rows of `train`.

    `train` has the models' features of the same images, by the same places, without augmentation:
    an image that cannot be read again keeps those.
    """
    row_N = torch.full((len(train.label_N),), -1)
    row_N[train.place_R] = torch.arange(len(train.place_R))

    @torch.inference_mode()
    def features(epoch: int) -> Mapping[str, Tensor]:
        found = {model.name: train.cls[model.name].clone() for model in models}
        with raised_on_all_ranks("feature extraction", "lower --eval.batch"):
            sizes = [model.size for model in models]
            for batch in images.augmented(sizes, epoch=epoch, seed=seed):
                place_B = torch.from_numpy(batch.place_B)
                row_B = row_N[place_B].where(place_B != FILLER, -1)
                for model in models:
                    found[model.name][row_B[row_B >= 0]] = encode_cls(model, batch)[row_B >= 0]
        return found

    return features
