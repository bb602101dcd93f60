"""A classifier on each of several data sets, and the mean (table 1 of arXiv 2408.05088)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.evaluator import Evaluator
from unic_ds.evaluate.features import Annotation, Model, ModelOutput

TRAIN = "/train"
PER_CLASS = " per class"
"""End of the row of a published probe that is not part of the means."""


class Transfer:
    """Accuracy in % of a classifier on each set, and unweighted means.

    `classifier` yields rows that begin with `row`, in whose place `TASK NAME` stands.
    """

    def __init__(self, task: str, classifier: Evaluator, row: str) -> None:
        self.task, self.classifier, self.row = task, classifier, row

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `TASK NAME` for the sets `NAME/train` and `NAME/val`, then `TASK mean`.

        Sets `GROUP/NAME` have a `TASK GROUP mean`. What else a row's name says, as ` k=20`, stands
        behind that of the set and of the mean.
        """
        values: dict[tuple[str, str], dict[str, float]] = {}
        for name in names_of(data):
            # Features of a set are freed with it.
            sets = {side: data.sets[f"{name}/{side}"] for side in ("train", "val")}
            for score in self.classifier.evaluate(models, replace(data, sets=sets, extracted={})):
                more = score.name.removeprefix(self.row)
                if more != PER_CLASS:
                    values.setdefault((score.model, more), {})[name] = score.value
                yield score._replace(
                    name=f"{self.task} {name}{more}",
                    protocol=f"{self.task} {name}: {score.protocol}",
                )
        for (model, more), found in values.items():
            yield from self.means(model, found, more)

    def means(self, model: str, values: Mapping[str, float], more: str) -> Iterator[Score]:
        """The unweighted means of a model: of each group of sets, then of all sets."""
        groups: dict[str, list[str]] = {}
        for name in values:
            if "/" in name:
                groups.setdefault(f"{name.split('/')[0]} mean", []).append(name)
        for mean, names in (groups | {"mean": list(values)}).items():
            protocol = f"{self.task} {mean}: unweighted, of {', '.join(names)}"
            value = fmean(values[name] for name in names)
            yield Score(model, f"{self.task} {mean}{more}", value, protocol)


def names_of(data: EvalData) -> list[str]:
    """Names of the data sets, in the order of `EvalData.sets`."""
    return [name.removesuffix(TRAIN) for name in data.sets if name.endswith(TRAIN)]
