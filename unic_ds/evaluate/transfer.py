"""Linear probe on each of several data sets, and the mean (table 1 of arXiv 2408.05088)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, Model, ModelOutput
from unic_ds.evaluate.linear import Linear

TRAIN = "/train"


class Transfer:
    """Accuracy in % of the linear probe on each set, and unweighted means."""

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `transfer NAME` for the sets `NAME/train` and `NAME/val`, then `transfer mean`.

        Sets `GROUP/NAME` have a `transfer GROUP mean`. A probe's second number has its name behind
        that of the set.
        """
        values: dict[str, dict[str, float]] = {model.name: {} for model in models}
        for name in names_of(data):
            # Features of a set are freed with it.
            sets = {side: data.sets[f"{name}/{side}"] for side in ("train", "val")}
            for score in Linear().evaluate(models, replace(data, sets=sets, extracted={})):
                if score.name == "linear":
                    values[score.model][name] = score.value
                yield score._replace(
                    name=score.name.replace("linear", f"transfer {name}", 1),
                    protocol=f"transfer {name}: {score.protocol}",
                )
        for model, found in values.items():
            yield from means(model, found)


def names_of(data: EvalData) -> list[str]:
    """Names of the data sets, in the order of `EvalData.sets`."""
    return [name.removesuffix(TRAIN) for name in data.sets if name.endswith(TRAIN)]


def means(model: str, values: Mapping[str, float]) -> Iterator[Score]:
    """The unweighted means of a model: of each group of sets, then of all sets."""
    groups: dict[str, list[str]] = {}
    for name in values:
        if "/" in name:
            groups.setdefault(f"{name.split('/')[0]} mean", []).append(name)
    for mean, names in (groups | {"mean": list(values)}).items():
        protocol = f"transfer {mean}: unweighted, of {', '.join(names)}"
        yield Score(model, f"transfer {mean}", fmean(values[name] for name in names), protocol)
