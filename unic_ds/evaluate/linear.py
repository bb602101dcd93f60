"""Linear probe: softmax regression on frozen CLS features, by the rule of `eval.protocol`.

All models are fitted together on all ranks, each with the images that it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch

from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.evaluator import images_used
from unic_ds.evaluate.features import Annotation, AugmentedImages, FeatureSet, Model, ModelOutput
from unic_ds.evaluate.linear_grid import fit_grid
from unic_ds.evaluate.linear_optuna import fit_optuna
from unic_ds.evaluate.linear_rates import fit_rates
from unic_ds.evaluate.linear_sgd import fit_sgd
from unic_ds.evaluate.linear_views import WITH_PATCHES, epoch_features, with_patches
from unic_ds.evaluate.probe import Probe, accuracy

LARGE = 100_000
"""Training images above which UNIC's probe is that of its large sets."""

Rule = Literal["grid", "optuna", "sgd", "sgd_augmented"]
FITS: dict[Rule, Callable[..., dict[str, Probe]]] = {
    "grid": fit_grid,
    "optuna": fit_optuna,
    "sgd": fit_sgd,
    "sgd_augmented": fit_rates,
}


class Linear:
    """Accuracy in % of a linear probe; option `eval.protocol`."""

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `linear` of each model, and `linear per class` by a paper's protocol."""
        augmented = data.options.rules.linear == "sgd_augmented"
        if augmented and isinstance(data.train, AugmentedImages):
            shown = [with_patches(model) for model in models]
            train, val = data.features(shown)
            probes = fit_on_views(shown, data, images=data.train, train=train)
        else:
            shown = list(models)
            train, val = data.features(shown)
            probes = fit_probes(train, data)
        train, val = train.labelled(), val.labelled()
        for model, known in zip(models, shown, strict=True):
            probe = probes[known.name]
            protocol = f"{probe.rule} {images_used(len(train.label_N), len(val.label_N), model)}"
            found = accuracy(probe, val, known.name)
            yield Score(model.name, "linear", found.top1, f"linear {protocol}")
            if data.options.rules.linear != "grid":
                name = "linear per class"
                yield Score(model.name, name, found.per_class, f"{name} {protocol}")


def fit_probes(train: FeatureSet, data: EvalData) -> dict[str, Probe]:
    """Linear probes of all models whose features `train` has, fitted together on these features.

    Rows without a label are left out. The features need not be those of a whole model. Every rank
    calls it. ValueError if the labels are of one class.
    """
    train = train.labelled()
    fit = FITS[rule_for(data.options.rules.linear, len(train.label_N))]
    return fit(train, seed=data.seed, device=data.device)


def rule_for(rule: Rule, rows: int) -> Rule:
    """The protocol's rule for so many training rows."""
    return "sgd" if rule == "optuna" and rows > LARGE else rule


def fit_on_views(
    models: Sequence[Model], data: EvalData, *, images: AugmentedImages, train: FeatureSet
) -> dict[str, Probe]:
    """Probes on augmented views of the training images; `models` as `with_patches` gives them."""
    views = epoch_features(models, images, train, seed=data.seed)
    has_R = train.label_R >= 0

    def labelled(epoch: int) -> Mapping[str, torch.Tensor]:
        return {name: x_RC[has_R] for name, x_RC in views(epoch).items()}

    paired = {model.name for model in models if model.name.endswith(WITH_PATCHES)}
    return fit_rates(train.labelled(), labelled, seed=data.seed, device=data.device, paired=paired)
