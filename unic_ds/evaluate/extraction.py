"""CLS features of an image set by several models: every image is encoded once, on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import dist
from unic_ds.evaluate.features import FILLER, EvalBatch, FeatureSet, ImageSet, Model
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.files.printable import printable
from unic_ds.process import console

REMEDY = "lower --eval.batch"
NAMED = 5
"""Unreadable images that a line names."""


class FeatureFile(Protocol):
    """Features of one model on one image set, as far as they were computed; N images."""

    def state(self) -> NDArray[np.int8]:
        """State of each image (N), the same on every rank: 0 missing, 1 stored, -1 unreadable."""

    def add(self, place_R: Tensor, row_RC: Tensor) -> None:
        """Add features of this rank's images; they are written now and then."""

    def flush(self, unreadable_M: NDArray[np.int64]) -> None:
        """Write what was added, and on rank 0 the places of images that no rank could read."""

    def load(self) -> None:
        """Read the state anew, once all ranks have written."""

    def agree(self) -> None:
        """Take rank 0's state; every rank calls it."""

    def rows(self, place_R: Tensor) -> Tensor:
        """Stored fp32 features (R, C) of images, by any rank."""


class FeatureStore(Protocol):
    """Keeps features between evaluations."""

    def open(self, models: Sequence[Model], images: ImageSet) -> dict[str, FeatureFile]:
        """The file of each model; every rank calls it. Models that are not kept are left out."""


def extract(
    models: Sequence[Model], images: ImageSet, store: FeatureStore | None = None
) -> FeatureSet:
    """CLS features of each model; every rank calls it.

    An image that cannot be read is left out of all models, counted and named. Features that
    `store` has are not computed again, and the others are added to it. RuntimeError, on every rank,
    if there are no images, or if a model gives another number of rows than images, or features that
    are not finite.
    """
    with raised_on_all_ranks("feature extraction", REMEDY):
        if not len(images):
            raise ValueError(
                "there are no images to take features of; give --eval.data DIR, --data.val DIR or"
                " --data.val_share"
            )
    files = store.open(models, images) if store else {}
    kept = [model for model in models if model.name in files]
    if kept:
        complete(kept, images, files)
    states = [files[model.name].state() for model in kept]
    usable_N = np.all([state >= 0 for state in states], axis=0) if kept else None
    others = [model for model in models if model.name not in files]
    cls, place_R = encode_all(others, images, usable_N)
    for model in kept:
        with raised_on_all_ranks(f"features of {model.name!r}", "lower --eval.max_train"):
            cls[model.name] = files[model.name].rows(place_R)
    label_N = torch.from_numpy(images.labels().astype(np.int64))
    read_N = torch.zeros(len(images), dtype=torch.int64)
    read_N[place_R] = 1
    times_N = dist.all_reduce_sum(read_N)
    assert (times_N <= 1).all(), "an image is counted twice"
    ordered = {model.name: cls[model.name] for model in models}
    return FeatureSet(ordered, place_R, label_N.where(times_N > 0, -1))


def complete(models: Sequence[Model], images: ImageSet, files: dict[str, FeatureFile]) -> None:
    """Encode the images whose features any of the files lacks, and store them."""
    # An image that could not be read may be readable now.
    missing = {model.name: files[model.name].state() <= 0 for model in models}
    lacking = [model for model in models if missing[model.name].any()]
    if not lacking:
        return
    todo_M = np.flatnonzero(np.any([missing[model.name] for model in lacking], axis=0))
    read_N = torch.zeros(len(images), dtype=torch.int64)
    with raised_on_all_ranks("feature extraction", REMEDY):
        for batch in images.batches([model.size for model in lacking], todo_M):
            place_B = torch.from_numpy(batch.place_B)
            counted_B = place_B != FILLER
            read_N[place_B[counted_B]] = 1
            for model in lacking:
                row_BC = encode_cls(model, batch)
                files[model.name].add(place_B[counted_B], row_BC[counted_B])
    read_N = dist.all_reduce_sum(read_N)
    unreadable_M = todo_M[read_N[torch.from_numpy(todo_M)].numpy() == 0]
    say_unreadable(images, unreadable_M)
    with raised_on_all_ranks("writing the feature cache", "use --eval.cache none"):
        for model in lacking:
            files[model.name].flush(unreadable_M)
    dist.barrier()
    with raised_on_all_ranks("reading the feature cache", "use --eval.cache none"):
        for model in lacking:
            files[model.name].load()
    for model in lacking:
        files[model.name].agree()


def encode_all(
    models: Sequence[Model], images: ImageSet, usable_N: NDArray[np.bool_] | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of models that are not stored, and the places (R) that this rank counts.

    `usable_N`: images that can be read, if it is known.
    """
    if not models:
        assert usable_N is not None
        dealt_R = np.arange(dist.rank(), len(images), dist.world())
        return {}, torch.from_numpy(dealt_R[usable_N[dealt_R]])
    rows: dict[str, list[Tensor]] = {model.name: [] for model in models}
    places: list[Tensor] = []
    with raised_on_all_ranks("feature extraction", REMEDY):
        for batch in images.batches([model.size for model in models]):
            place_B = torch.from_numpy(batch.place_B)
            counted_B = place_B != FILLER
            if usable_N is not None:
                counted_B &= torch.from_numpy(usable_N)[place_B.clamp(min=0)]
            for model in models:
                rows[model.name].append(encode_cls(model, batch)[counted_B])
            places.append(place_B[counted_B])
        cls = {name: torch.cat(part) for name, part in rows.items()}
    place_R = torch.cat(places)
    if usable_N is None:
        read_N = torch.zeros(len(images), dtype=torch.int64)
        read_N[place_R] = 1
        say_unreadable(images, np.flatnonzero(dist.all_reduce_sum(read_N).numpy() == 0))
    return cls, place_R


def say_unreadable(images: ImageSet, place_M: NDArray[np.int64]) -> None:
    """Print how many images of a set cannot be read, and the first of them."""
    if len(place_M):
        names = ", ".join(printable(images.file_name(int(i)), 80) for i in place_M[:NAMED])
        more = f" and {len(place_M) - NAMED} more" if len(place_M) > NAMED else ""
        console.say(
            f"{len(place_M)} of {len(images)} images of {printable(images.name)} cannot be read and"
            f" are left out of all models: {names}{more}"
        )


# Not around the images' iteration: threads that decode do not inherit the mode.
@torch.inference_mode()
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
        raise ValueError(
            f"features of {model.name!r} are NaN or infinite; leave the model out, or set"
            " --eval.on false or --probe.every 0"
        )
    return cls_BC
