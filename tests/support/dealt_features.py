"""The table of features that are dealt to the ranks: `dealt_features.py ROWS.pt`.

The file holds training features and labels, then those of validation. ROWS.measured says of each
rank: the table, sums over the rows, and what a NaN on one rank raises.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unic_ds import dist
from unic_ds.config import Eval
from unic_ds.evaluate import features, registry, table
from unic_ds.evaluate.features import Annotation, EvalBatch, Model, Outputs

COLUMNS = {"narrow": slice(8), "wide": slice(8, 48), "middle": slice(48, 72)}


class Images(NamedTuple):
    """Rows in the place of images; each model sees its columns."""

    value_NC: Tensor
    label_N: Tensor
    annotations: frozenset[Annotation] = frozenset({"labels"})

    def __len__(self) -> int:
        return len(self.label_N)

    def batches(self, sizes: Sequence[int]) -> Iterator[EvalBatch]:
        """This rank's rows."""
        place_R, counted_R = features.deal(len(self))
        for at in range(0, len(place_R), 16):
            place_B = place_R[at : at + 16]
            counted_B = np.where(counted_R[at : at + 16], place_B, features.FILLER)
            images = dict.fromkeys(sizes, self.value_NC[place_B])
            yield EvalBatch(images, counted_B, {"labels": self.label_N[place_B]})


class Sums:
    """Yields a sum in which each image has a weight of its own."""

    model_needs = frozenset({"cls"})
    data_needs = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: features.EvalData) -> Iterator[table.Score]:
        """Yield the sums of both sets."""
        for name, side in zip(("train", "val"), data.features(models), strict=True):
            side = side.labelled()
            weight_R = side.place_R.double() * side.label_R
            for model in models:
                total = dist.all_reduce_sum(weight_R @ side.cls[model.name].double().sum(1))
                yield table.Score(model.name, name, float(total), "sum")


def encoder(name: str) -> Model:
    """The model of some columns."""
    return Model(
        name, 1, frozenset({"cls"}), lambda rows, _: Outputs(rows[:, COLUMNS[name]].clone())
    )


def rows_of(rows: list[Tensor], names: list[str]) -> dict[str, dict[str, float]]:
    """The table of some evaluators."""
    scores = registry.evaluate_models(
        [encoder(name) for name in COLUMNS],
        Images(*rows[:2]),
        Images(*rows[2:]),
        options=Eval(),
        seed=1,
        device=dist.device(),
        names=names,
    )
    return table.tabulate(scores)[0]


def measured(rows: list[Tensor]) -> list[object]:
    """The table, the sums, and the sentence of a failure."""
    sums = [value for row in rows_of(rows, ["sums"]).values() for value in row.values()]
    found: list[object] = [rows_of(rows, ["knn", "linear"]), sums]
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
