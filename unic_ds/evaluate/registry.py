"""All evaluators by name; a package of your own adds one by `EVALUATORS["mine"] = Mine()`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from unic_ds.config import Eval
from unic_ds.evaluate.evaluator import Evaluator
from unic_ds.evaluate.features import EvalData, ImageSet, Model
from unic_ds.evaluate.knn import KNN
from unic_ds.evaluate.linear import Linear
from unic_ds.evaluate.table import Score
from unic_ds.process import console

EVALUATORS: dict[str, Evaluator] = {"knn": KNN(), "linear": Linear()}
"""Name -> evaluator, in the order of the table's columns."""


def evaluate_models(
    models: Sequence[Model],
    train: ImageSet,
    val: ImageSet,
    *,
    options: Eval,
    seed: int,
    device: torch.device,
    names: Iterable[str] | None = None,
) -> list[Score]:
    """Scores of frozen models by the evaluators `names` (None: all), the same on every rank.

    Every rank calls it, after training or at any step: it leaves random states and the training
    stream as they are. Under ZeRO-3 the caller gathers the student's weights first. RuntimeError,
    on every rank, if an evaluation fails on one; ValueError for an unknown name.
    """
    data = EvalData(
        train, val, k=options.k, temperature=options.temperature, seed=seed, device=device
    )
    scores: list[Score] = []
    for name in EVALUATORS if names is None else names:
        if name not in EVALUATORS:
            known = ", ".join(EVALUATORS)
            raise ValueError(f"there is no evaluator {name!r}; choose from {known}")
        evaluator = EVALUATORS[name]
        able = [model for model in models if evaluator.model_needs <= model.outputs]
        missing = evaluator.data_needs - (train.annotations & val.annotations)
        if missing or not able:
            lack = ", ".join(sorted(missing or evaluator.model_needs))
            of = "images with" if missing else "a model with"
            console.say(f"not evaluated by {name}, which needs {of} {lack}")
            continue
        scores += evaluator.evaluate(able, data)
    return scores
