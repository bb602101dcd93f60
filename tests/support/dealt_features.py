"""The table of features that are dealt to the ranks: `dealt_features.py ROWS.pt`.

The file holds training features and labels, then those of validation. ROWS.measured says of each
rank: the table, sums over the rows, probes by papers' rules, and what a NaN on one rank raises.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from memory_sets import MemoryImages, columns_model
from torch import Tensor

from unic_ds import dist
from unic_ds.config import Eval
from unic_ds.evaluate import registry
from unic_ds.evaluate.comparison import Comparison, Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Model
from unic_ds.evaluate.linear_optuna import fit_optuna
from unic_ds.evaluate.linear_rates import fit_rates
from unic_ds.evaluate.linear_sgd import fit_sgd
from unic_ds.evaluate.probe import accuracy

COLUMNS = {"narrow": slice(8), "wide": slice(8, 48), "middle": slice(48, 72)}


class Sums:
    """Yields a sum in which each image has a weight of its own."""

    model_needs = frozenset({"cls"})
    data_needs = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield the sums of both sets."""
        for name, side in zip(("train", "val"), data.features(models), strict=True):
            side = side.labelled()
            weight_R = side.place_R.double() * side.label_R
            for model in models:
                total = dist.all_reduce_sum(weight_R @ side.cls[model.name].double().sum(1))
                yield Score(model.name, name, float(total), "sum")


def rows_of(rows: list[Tensor], names: list[str]) -> dict[str, dict[str, float]]:
    """The table of some evaluators."""
    sets = {"train": MemoryImages(*rows[:2]), "val": MemoryImages(*rows[2:])}
    data = EvalData(sets, options=Eval(), seed=1, device=dist.device())
    models = [columns_model(name, columns) for name, columns in COLUMNS.items()]
    scores = registry.evaluate_models(models, data, names)
    return Comparison.of(scores, {model.name: model.role for model in models}).by_model()


def by_papers(rows: list[Tensor]) -> list[float]:
    """Accuracies of a model's probes by papers' rules, and sums of their logits."""
    sets = {"train": MemoryImages(*rows[:2]), "val": MemoryImages(*rows[2:])}
    data = EvalData(sets, options=Eval(protocol="eupe"), seed=1, device=dist.device())
    models = [columns_model("wide", COLUMNS["wide"])]
    found = [score.value for score in registry.evaluate_models(models, data, ["knn"])]
    train, val = (side.labelled() for side in data.features(models))
    both = {"seed": 1, "device": dist.device()}
    for fitted in (
        fit_optuna(train, trials=2, **both),
        fit_sgd(train, epochs=8, pairs=3, **both),
        fit_rates(train, **both),
    ):
        found += accuracy(fitted["wide"], val, "wide")
        logit_RL = fitted["wide"].logits(val.cls["wide"]).double()
        found.append(float(dist.all_reduce_sum(logit_RL.abs().sum())))
    return found


def measured(rows: list[Tensor]) -> list[object]:
    """The table, the sums, papers' probes, and the sentence of a failure."""
    sums = [value for row in rows_of(rows, ["sums"]).values() for value in row.values()]
    found: list[object] = [rows_of(rows, ["knn", "linear"]), sums, by_papers(rows)]
    rows[2][0, -1] = torch.nan  # a row of rank 0
    try:
        rows_of(rows, ["knn", "linear"])
    except RuntimeError as error:
        found.append(str(error))
    return found


if __name__ == "__main__":
    dist.start()
    registry.EVALUATORS["sums"] = Sums()
    file = Path(sys.argv[1])
    every = dist.all_gather_objects(measured(torch.load(file)))
    if dist.rank() == 0:
        file.with_suffix(".measured").write_text(json.dumps(every))
