"""Image sets and models in memory, whose features a test chooses.

The "images" of a set are rows of features: a model sees its columns of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unic_ds.config import Eval
from unic_ds.evaluate import features, registry
from unic_ds.evaluate.comparison import Role, Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, EvalBatch, Model, Outputs


@dataclass
class MemoryImages:
    """An image set in memory (`features.ImageSet`), in batches of `batch`."""

    value_NC: Tensor
    """Images or rows of features."""
    label_N: Tensor
    classes: tuple[str, ...] = ()
    name: str = "memory"
    identity: str = ""
    batch: int = 16
    annotations: frozenset[Annotation] = frozenset({"labels"})
    files: Sequence[str] = field(default=())

    def __len__(self) -> int:
        return len(self.label_N)

    def labels(self) -> np.ndarray:
        """The classes."""
        return self.label_N.numpy()

    def file_name(self, place: int) -> str:
        """The given name, or the number."""
        return self.files[place] if self.files else f"{place}.png"

    def batches(self, sizes: Sequence[int], only: np.ndarray | None = None) -> Iterator[EvalBatch]:
        """This rank's rows."""
        places_N = np.arange(len(self)) if only is None else only
        dealt_R, counted_R = features.deal(len(places_N))
        place_R = places_N[dealt_R]
        for at in range(0, len(place_R), self.batch):
            place_B = place_R[at : at + self.batch]
            counted_B = np.where(counted_R[at : at + self.batch], place_B, features.FILLER)
            images = dict.fromkeys(sizes, self.value_NC[place_B])
            yield EvalBatch(images, counted_B, {"labels": self.label_N[place_B].numpy()})


def columns_model(name: str, columns: slice = slice(None), role: Role = "teacher") -> Model:
    """A model whose CLS features are some columns of the rows."""

    def encode(row_BC: Tensor, _: object) -> Outputs:
        return Outputs(row_BC[:, columns].clone())

    return Model(name, 1, frozenset({"cls"}), encode, role)


def scores_of(
    name: str,
    models: Sequence[Model],
    sets: Mapping[str, Any],
    options: Eval | None = None,
    *,
    seed: int = 0,
    **more: Any,
) -> list[Score]:
    """Scores of an evaluator on sets; `more` are further fields of EvalData."""
    cpu = torch.device("cpu")
    data = EvalData(sets, options=options or Eval(), seed=seed, device=cpu, **more)
    return registry.evaluate_models(models, data, [name])
