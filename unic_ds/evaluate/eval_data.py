"""Data of an evaluation: image sets, options, and the features that were extracted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from unic_ds.config import Eval
from unic_ds.evaluate.extraction import FeatureStore, extract
from unic_ds.evaluate.features import Annotation, Classifier, FeatureSet, ImageSet, Model, TextTower
from unic_ds.evaluate.samples import SampleSet

AnySet = ImageSet | SampleSet[Any]


@dataclass
class EvalData:
    """Images that models are evaluated on, and the settings; the same on every rank."""

    sets: Mapping[str, AnySet]
    """`train` and `val`; of several data sets `NAME/train` and `NAME/val`; further test sets."""
    options: Eval
    seed: int
    device: torch.device
    text_towers: Mapping[str, TextTower] = field(default_factory=dict)
    """By the name of the teacher."""
    classifiers: Mapping[str, Classifier] = field(default_factory=dict)
    """By the name of the teacher."""
    store: FeatureStore | None = None
    """Features on disk; None: features are kept in memory only."""
    extracted: dict[tuple[str, str], FeatureSet] = field(default_factory=dict)
    """(set, model) -> its features, once an evaluator has asked for them."""

    @property
    def train(self) -> ImageSet:
        """The training images."""
        return self.images("train")

    @property
    def val(self) -> ImageSet:
        """The validation images."""
        return self.images("val")

    def images(self, name: str) -> ImageSet:
        """A set of images that are read as squares."""
        found = self.sets[name]
        assert hasattr(found, "batches"), f"{name} is a set of samples"
        return cast(ImageSet, found)

    def samples(self, name: str) -> SampleSet[Any]:
        """A set of images with dense annotations."""
        found = self.sets[name]
        assert hasattr(found, "read"), f"{name} is a set of squares"
        return cast("SampleSet[Any]", found)

    def annotations(self) -> frozenset[Annotation]:
        """Kinds of annotation that every set has."""
        return frozenset.intersection(*(found.annotations for found in self.sets.values()))

    def features(self, models: Sequence[Model]) -> tuple[FeatureSet, FeatureSet]:
        """CLS features of the training and the validation images; errors as `extract`."""
        return self.features_of(models, "train"), self.features_of(models, "val")

    def features_of(self, models: Sequence[Model], name: str) -> FeatureSet:
        """CLS features of one set.

        Each model's are extracted once, for all evaluators, and the images decoded once for all
        models that are asked for together. Every rank calls it.
        """
        new = [model for model in models if (name, model.name) not in self.extracted]
        if new:
            found = extract(new, self.images(name), self.store)
            self.extracted |= {(name, model.name): found for model in new}
        first = self.extracted[name, models[0].name]
        cls = {m.name: self.extracted[name, m.name].cls[m.name] for m in models}
        return FeatureSet(cls, first.place_R, first.label_N)
