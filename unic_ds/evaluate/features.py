"""CLS features of an image set by several models: every image is encoded once, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.tokens import Tokens

ModelOutput = Literal["cls", "patch", "projection"]
Annotation = Literal["labels", "masks", "boxes", "depth", "text"]
FILLER = -1
"""Place of an image that is encoded but not counted."""


class Outputs(NamedTuple):
    """Features of an image batch by one model, as far as they were asked for."""

    cls_BC: Tensor | None = None
    patch_BNC: Tensor | None = None
    projection: Mapping[str, Tokens] | None = None
    """Predictions of each teacher's tokens, by the teacher's name."""


@dataclass(frozen=True)
class Model:
    """A frozen encoder under evaluation."""

    name: str
    size: int
    """Side of its images in pixels; `dataclasses.replace` gives the same model at another."""
    outputs: frozenset[ModelOutput]
    encode: Callable[[Tensor, frozenset[ModelOutput]], Outputs]
    """Takes uint8 images (B, 3, size, size) on the device, and what is needed of `outputs`.

    It keeps no graph for gradients.
    """


class EvalBatch(NamedTuple):
    """Images of one rank, and what is known of them."""

    images: Mapping[int, Tensor]
    """Side in pixels -> uint8 B3HW on the device."""
    place_B: NDArray[np.int64]
    """Place of each image in its set; FILLER: not to be counted."""
    annotations: Mapping[Annotation, Any]
    """One entry an image under each name: `labels` are int64 (B), -1 without a class."""


class ImageSet(Protocol):
    """Images that are dealt to the ranks: each place is counted on exactly one."""

    @property
    def annotations(self) -> frozenset[Annotation]:
        """Kinds of annotation that its batches bring."""

    def __len__(self) -> int:
        """Number of images on all ranks together."""

    def batches(self, sizes: Sequence[int]) -> Iterator[EvalBatch]:
        """This rank's images once, without augmentation.

        Equally many batches on every rank, filled up by fillers: a model may have collectives.
        """


def deal(count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Places of this rank's images, of `count` that are dealt in turn, and a mask of the counted.

    Equally many on every rank: the last may be one that another rank counts.
    """
    dealt_R = np.arange(dist.rank(), -(-count // dist.world()) * dist.world(), dist.world())
    return dealt_R % max(count, 1), dealt_R < count


@dataclass(frozen=True)
class FeatureSet:
    """CLS features of the images that this rank counts, on the CPU."""

    cls: Mapping[str, Tensor]
    """Model -> fp32 features (R, C)."""
    place_R: Tensor
    """Places of the rows among all N, ascending."""
    label_N: Tensor
    """Labels of all images, on every rank; -1 for one without a class or that was not read."""

    @property
    def label_R(self) -> Tensor:
        """Labels of this rank's rows."""
        return self.label_N[self.place_R]

    def labelled(self) -> FeatureSet:
        """The images with a label alone, numbered anew."""
        has_N, has_R = self.label_N >= 0, self.label_R >= 0
        return FeatureSet(
            {name: rows_RC[has_R] for name, rows_RC in self.cls.items()},
            (has_N.cumsum(0) - 1)[self.place_R[has_R]],
            self.label_N[has_N],
        )


@torch.inference_mode()
def extract(models: Sequence[Model], images: ImageSet) -> FeatureSet:
    """CLS features of each model; every rank calls it.

    RuntimeError, on every rank, if there are no images, or if a model gives another number of rows
    than images, or features that are not finite.
    """
    rows: dict[str, list[Tensor]] = {model.name: [] for model in models}
    places: list[Tensor] = []
    labels: list[Tensor] = []
    with raised_on_all_ranks("feature extraction", "lower --eval.batch"):
        for batch in images.batches([model.size for model in models]):
            place_B = torch.from_numpy(batch.place_B)
            counted_B = place_B != FILLER
            for model in models:
                rows[model.name].append(encode_cls(model, batch)[counted_B])
            places.append(place_B[counted_B])
            label_B = batch.annotations.get("labels", np.full(len(place_B), -1))
            labels.append(torch.as_tensor(label_B, dtype=torch.int64)[counted_B])
        if not places:
            raise ValueError(
                "there are no images to take features of; give data.val or data.val_share"
            )
        cls = {name: torch.cat(part) for name, part in rows.items()}
    place_R = torch.cat(places)
    return FeatureSet(cls, place_R, labels_of_all(place_R, torch.cat(labels), len(images)))


def encode_cls(model: Model, batch: EvalBatch) -> Tensor:
    """fp32 CLS features (B, C) of a batch on the CPU; ValueError as `extract`."""
    cls_BC = model.encode(batch.images[model.size], frozenset({"cls"})).cls_BC
    assert cls_BC is not None, f"{model.name} has no CLS features"
    cls_BC = cls_BC.float().cpu()
    if len(cls_BC) != len(batch.place_B):
        raise ValueError(
            f"{model.name!r} gave {len(cls_BC)} rows of features for {len(batch.place_B)} images"
        )
    if not cls_BC.isfinite().all():
        raise ValueError(f"features of {model.name!r} are NaN or infinite; set --eval.on false")
    return cls_BC


def labels_of_all(place_R: Tensor, label_R: Tensor, count: int) -> Tensor:
    """Labels of all ranks' images by place (N), -1 if no rank has the image."""
    seen_N2 = torch.zeros(count, 2, dtype=torch.int64)
    ones_R = torch.ones_like(label_R)
    seen_N2.index_add_(0, place_R, torch.stack([label_R + 1, ones_R], 1))
    label_N, times_N = dist.all_reduce_sum(seen_N2).unbind(1)
    assert (times_N <= 1).all(), "an image is counted twice"
    return label_N - 1


@dataclass
class EvalData:
    """Images that models are evaluated on, and the settings; the same on every rank."""

    train: ImageSet
    val: ImageSet
    k: int
    temperature: float
    seed: int
    device: torch.device
    extracted: dict[str, tuple[FeatureSet, FeatureSet]] = field(default_factory=dict)
    """Model -> its features, once an evaluator has asked for them."""

    def features(self, models: Sequence[Model]) -> tuple[FeatureSet, FeatureSet]:
        """CLS features of the training and the validation images.

        Each model's are extracted once, for all evaluators, and the images decoded once for all
        models that are asked for together. Every rank calls it.
        """
        new = [model for model in models if model.name not in self.extracted]
        if new:
            sides = extract(new, self.train), extract(new, self.val)
            self.extracted |= {model.name: sides for model in new}
        train, val = (
            FeatureSet(
                {model.name: self.extracted[model.name][at].cls[model.name] for model in models},
                self.extracted[models[0].name][at].place_R,
                self.extracted[models[0].name][at].label_N,
            )
            for at in range(2)
        )
        return train, val


def pixels(image_B3HW: Tensor, size: int = 16) -> Tensor:
    """The baseline without a model: grey thumbnails scaled to [-1, 1], (B, size * size) fp32."""
    grey_B1HW = image_B3HW.float().mean(1, keepdim=True)
    small_B1HW = F.interpolate(grey_B1HW, (size, size), mode="bilinear", antialias=True)
    return small_B1HW.flatten(1) / 127.5 - 1
