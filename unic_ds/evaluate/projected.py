"""Accuracy of classifiers on predictions of a teacher's tokens, in one pass over the images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from unic_ds import dist
from unic_ds.evaluate.features import FILLER, EvalBatch, ImageSet, Model
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.tokens import KINDS, Tokens

TOP = 5
WNID = re.compile(r"n\d{8}")
"""A WordNet id, as ImageNet's folders are named."""
NUMBER = re.compile(r"[0-9]{1,18}")


class Head(NamedTuple):
    """A classifier of the tokens of a teacher."""

    logits: Callable[[Tokens], Tensor]
    """Logits (B, L) of the set's classes."""
    kinds: frozenset[str]
    """Kinds of token that it reads."""


class Accuracy(NamedTuple):
    """Accuracies of a model's predictions of one teacher, in %, and the images counted."""

    model: Model
    teacher: str
    first: float
    """Top-1."""
    five: float
    """Top-5."""
    images: int


Hits = dict[tuple[str, str], Tensor]
"""(model, teacher) -> images, those with the right class first, and among the first five."""


@torch.inference_mode()
def accuracies(
    models: Sequence[Model], images: ImageSet, heads: Mapping[str, Head], *, task: str
) -> list[Accuracy]:
    """Accuracies by model and teacher; every rank calls it.

    A model is left out for a teacher if it does not predict the tokens that the teacher's head
    reads. RuntimeError, on every rank, if there are no labelled images, or if the work fails on
    one.
    """
    hits: Hits = {}
    with raised_on_all_ranks(task, "lower --eval.batch"):
        for batch in images.batches([model.size for model in models]):
            for model in models:
                count_hits(hits, model, batch, heads)
    totals = {key: dist.all_reduce_sum(hits_3).tolist() for key, hits_3 in sorted(hits.items())}
    found = []
    for model in models:
        for teacher in heads:
            counted, first, five = totals.get((model.name, teacher), (1, 0, 0))
            if not counted:
                raise RuntimeError(f"{images.name} has no image with a class that can be read")
            if (model.name, teacher) in totals:
                rates = 100 * first / counted, 100 * five / counted
                found.append(Accuracy(model, teacher, *rates, counted))
    return found


def count_hits(hits: Hits, model: Model, batch: EvalBatch, heads: Mapping[str, Head]) -> None:
    """Add a batch's right answers; ValueError for logits that are not finite."""
    projection = model.encode(batch.images[model.size], frozenset({"projection"})).projection
    assert projection is not None, f"{model.name} has no projection"
    label_B = torch.as_tensor(batch.annotations["labels"], dtype=torch.int64)
    counted_B = (torch.from_numpy(batch.place_B) != FILLER) & (label_B >= 0)
    for teacher, head in heads.items():
        tokens = projection.get(teacher)
        if tokens is None or not all(tokens[KINDS.index(kind)].numel() for kind in head.kinds):
            continue
        logit_BL = head.logits(tokens).float().cpu()[counted_B]
        if not logit_BL.isfinite().all():
            raise ValueError(
                f"predictions of {teacher!r} by {model.name!r} are NaN or infinite; leave it out"
            )
        nearest_BK = logit_BL.topk(min(TOP, logit_BL.shape[1])).indices
        right_BK = nearest_BK == label_B[counted_B, None]
        found_3 = torch.stack([counted_B.sum(), right_BK[:, :1].sum(), right_BK.sum()])
        before_3 = hits.get((model.name, teacher), torch.zeros_like(found_3))
        hits[model.name, teacher] = before_3 + found_3


def imagenet_ids(classes: int) -> tuple[str, ...]:
    """WordNet ids of a classifier of so many classes, in order; empty if it is not ImageNet's."""
    subset = infer_imagenet_subset({"num_classes": classes})
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


def class_numbers(names: Sequence[str]) -> tuple[int, ...]:
    """Numbers of classes by the names of their folders, as ImageNet-V2's; empty if some have none.

    Folders are in the order of their text: 0, 1, 10, 100, 11, ...
    """
    return tuple(map(int, names)) if all(map(NUMBER.fullmatch, names)) else ()
