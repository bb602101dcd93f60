"""One linear probe on several test sets: domain shift, and ImageNet's reassessed labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor

from unic_ds import dist
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.evaluator import images_used
from unic_ds.evaluate.features import Annotation, FeatureSet, ImageSet, Model, ModelOutput
from unic_ds.evaluate.linear import fit_probes
from unic_ds.evaluate.probe import REMEDY, Probe
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

SUBSETS = {"imageneta": "imagenet_a_synsets.txt", "imagenetr": "imagenet_r_synsets.txt"}
"""Letters of a folder's name -> timm's list of its classes (arXiv 1907.07174, 2006.16241)."""
IMAGENET_VAL_IMAGES = 50_000
IMAGENET_VAL_FILE = "ILSVRC2012_val_{:08d}.JPEG"


class Robustness:
    """Accuracy in % of the probe of `train` on every other set."""

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `robustness NAME` of each other set, whose classes are some of those of `train`.

        A set with fewer classes is predicted among these alone, as is usual for ImageNet-A and -R.
        A set with the file names of ImageNet's validation images has another score, `robustness
        NAME ReaL`, if `train` has ImageNet's classes (arXiv 2006.07159).
        """
        train = data.features_of(models, "train")
        probes = fit_probes(train, data)
        count = int((train.label_N >= 0).sum())
        for name in data.sets:
            if name == "train":
                continue
            images = data.images(name)
            test = ShiftedSet(data.features_of(models, name), *matched(name, images, data.train))
            real = real_labels(images, data.train)
            for model in models:
                probe = probes[model.name]
                found_R = predicted(probe, test.features.cls[model.name], test.wanted_M)
                value, tested = share_of(test.right(found_R))
                used = f"{test.rule(len(data.train.classes))} {images_used(count, tested, model)}"
                how = f"linear {probe.rule}, {used}"
                yield Score(model.name, f"robustness {name}", value, how)
                if real is not None:
                    value, tested = share_of(really_right(found_R, test.features, real))
                    used = images_used(count, tested, model)
                    how = f"linear {probe.rule}, any ReaL label counts {used}"
                    yield Score(model.name, f"robustness {name} ReaL", value, how)


@dataclass(frozen=True)
class ShiftedSet:
    """A test set whose classes are known by their labels in the training set."""

    features: FeatureSet
    label_M: Tensor
    """The set's own class -> the label of the same class in the training set."""
    wanted_M: Tensor
    """Training labels among which its images are predicted."""

    def right(self, found_R: Tensor) -> Tensor:
        """Mask of the right predictions, of this rank's rows that have a label."""
        label_R = self.features.label_R
        has_R = label_R >= 0
        return found_R[has_R] == self.label_M[label_R[has_R]]

    def rule(self, classes: int) -> str:
        """The predicted classes, of so many, as a part of a protocol."""
        return f"among {len(self.wanted_M)} of {classes} classes"


def matched(name: str, images: ImageSet, train: ImageSet) -> tuple[Tensor, Tensor]:
    """`ShiftedSet.label_M` and `ShiftedSet.wanted_M` of a set whose classes `train` has.

    ImageNet-A and -R have all classes of timm's lists, also if some of the folders are missing.
    """
    label_of = {found: label for label, found in enumerate(train.classes)}
    wanted = set(images.classes)
    listed = SUBSETS.get(re.sub(r"[^a-z0-9]", "", name.lower()))
    if listed and wanted <= set(synsets(listed)) <= label_of.keys():
        wanted = set(synsets(listed))
    label_M = torch.tensor([label_of[found] for found in images.classes])
    return label_M, torch.tensor(sorted(label_of[found] for found in wanted))


@cache
def synsets(file: str) -> tuple[str, ...]:
    """A list of classes in timm."""
    return tuple((files("timm.data") / "_info" / file).read_text("utf-8").split())


def predicted(probe: Probe, x_RC: Tensor, wanted_M: Tensor) -> Tensor:
    """The likeliest label (R) of each row among those wanted, on the CPU.

    -1 if the probe knows none of them. Every rank calls it.
    """
    found_R = torch.full((len(x_RC),), -1)
    with raised_on_all_ranks("the linear probe", REMEDY):
        known_L = torch.isin(probe.classes, wanted_M)
        if len(x_RC) and known_L.any():
            logit_RM = probe.logits(x_RC)[:, known_L.to(probe.weight_DL.device)]
            found_R = probe.classes[known_L][logit_RM.argmax(1).cpu()]
    return found_R


def share_of(right_R: Tensor) -> tuple[float, int]:
    """True entries of all ranks' masks in %, and the number of all entries."""
    counts = torch.tensor([int(right_R.sum()), len(right_R)])
    right, count = dist.all_reduce_sum(counts).tolist()
    return 100 * right / max(count, 1), count


def real_labels(images: ImageSet, train: ImageSet) -> Mapping[int, Sequence[int]] | None:
    """Place of an image -> its ReaL labels; None for images other than ImageNet's validation."""
    if train.classes != tuple(ImageNetInfo().label_names()):
        return None
    found: dict[int, Sequence[int]] = {}
    for place in range(len(images)):
        file = PurePosixPath(images.file_name(place)).name
        if file not in imagenet_real():
            return None
        found[place] = imagenet_real()[file]
    return found


@cache
def imagenet_real() -> Mapping[str, Sequence[int]]:
    """File name of each of ImageNet's validation images -> its ReaL labels, none for some."""
    names = [IMAGENET_VAL_FILE.format(i + 1) for i in range(IMAGENET_VAL_IMAGES)]
    return RealLabelsImagenet(names).real_labels


def really_right(
    found_R: Tensor, features: FeatureSet, real: Mapping[int, Sequence[int]]
) -> Tensor:
    """Mask of the predictions that are a ReaL label, of this rank's rows that have one or more."""
    rows = zip(found_R.tolist(), features.place_R.tolist(), strict=True)
    right = [label in real[place] for label, place in rows if real[place]]
    return torch.tensor(right, dtype=torch.bool)
