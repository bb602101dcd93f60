"""The contract of an evaluator: a class that measures frozen models on an image set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, Model, ModelOutput


class Evaluator(Protocol):
    """Measures models; a file of its own, and an entry of `registry.EVALUATORS`."""

    @property
    def model_needs(self) -> frozenset[ModelOutput]:
        """Outputs without which a model is left out."""

    @property
    def data_needs(self) -> frozenset[Annotation]:
        """Annotations of both image sets without which nothing is measured."""

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield the scores of the models, the same on every rank.

        All ranks call it, also during training: it draws nothing from a global random state, and
        leaves the models as they are. An image counts on the rank that has it (`ImageSet`), and
        sums go through `dist`. Local work that may fail on one rank alone, between collectives,
        stands in `rank_errors.raised_on_all_ranks`. The models come together, so that they may
        share a pass over the images (`EvalData.features`) or a solver.
        """


@runtime_checkable
class ChecksItsData(Protocol):
    """An evaluator that can tell before any feature is computed that data do not fit."""

    def check(self, data: EvalData) -> None:
        """Raise ValueError, one sentence with the remedy, for data that do not fit."""


def images_used(train: int, val: int, model: Model) -> str:
    """The end of a protocol: images of both sets and their side."""
    return f"{train}/{val} images {model.size} px"
