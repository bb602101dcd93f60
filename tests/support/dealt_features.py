"""The table of features that are dealt to the ranks: `dealt_features.py ROWS.pt`.

The file holds training features and labels, then those of validation. ROWS.measured says of each
rank: the table, which rank evaluated each model, and what a NaN in the last model raises.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from unic_ds import dist
from unic_ds.evaluate import knn, linear, rounds

WIDTHS = {"narrow": 8, "wide": 40, "middle": 24}


def side(value_NC: Tensor, label_N: Tensor) -> rounds.Side:
    """Features of which this rank holds its share, as after an extraction."""
    return rounds.Side(value_NC[rounds.dealt(len(label_N))], label_N)


def owner(*rows: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the rank that evaluates a model, and a sum in which each row has its own weight."""
    yield "rank", dist.rank()
    for value_NC, label_N in zip(rows[::2], rows[1::2], strict=True):
        place_N = torch.arange(len(value_NC)).double()
        yield f"sum of {len(value_NC)}", float((place_N * label_N) @ value_NC.double().sum(1))


def measured(rows: list[Tensor]) -> list[object]:
    """The table, the owners, and the sentence of a failure."""
    evaluators = knn.knn, partial(linear.linear, seed=1)
    sides = side(*rows[:2]), side(*rows[2:])
    found: list[object] = [
        rounds.evaluate(*sides, WIDTHS, chosen, dist.device()) for chosen in (evaluators, [owner])
    ]
    rows[0][:, -1] = torch.nan
    try:
        rounds.evaluate(side(*rows[:2]), sides[1], WIDTHS, evaluators, dist.device())
    except RuntimeError as error:
        found.append(str(error))
    return found


if __name__ == "__main__":
    dist.start()
    file = Path(sys.argv[1])
    every = dist.all_gather_objects(measured(torch.load(file)))
    if dist.rank() == 0:
        file.with_suffix(".measured").write_text(json.dumps(every))
