"""kNN and agreement with the teachers at several image sizes (RADIOv2.5, arXiv 2412.07679)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, Model, ModelOutput
from unic_ds.evaluate.fidelity import MEASURES, PROJECTION, Sums, agreements
from unic_ds.evaluate.knn import KNN
from unic_ds.process import console

FACTORS = (0.5, 1.0, 1.5, 2.0)
"""Sizes without `eval.sizes`, as multiples of the student's."""


class Resolutions:
    """Scores at the sizes of `eval.sizes`, rounded to a model's patches."""

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset()

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `resolutions knn SIZE` of students and teachers, and of students their fidelity.

        A model that is built for one side is measured there alone. Fidelity is that of the task
        `teacher`: the teachers stay at their own side, and their maps are resized.
        """
        compared = [model for model in models if model.role != "baseline"]
        if not compared:
            return
        sizes = data.options.sizes or default_sizes(compared)
        if "labels" in data.annotations():
            yield from nearest_neighbours(compared, data, sizes)
        teachers = [m for m in compared if m.role == "teacher" and m.outputs >= PROJECTION]
        for student in compared:
            if student.role == "student" and student.outputs >= PROJECTION and teachers:
                yield from fidelities(student, teachers, data, sizes)


def default_sizes(models: Sequence[Model]) -> tuple[int, ...]:
    """Half, once, 1.5 times and twice the side of the first student, or of the first model."""
    first = next((model for model in models if model.role == "student"), models[0])
    found = (nearest_side(first, round(factor * first.size)) for factor in FACTORS)
    return tuple(dict.fromkeys(found))


def nearest_side(model: Model, size: int) -> int:
    """The multiple of a model's patch that is nearest to `size`, at least one patch."""
    patch = max(model.patch, 1)
    return max(1, int(size / patch + 0.5)) * patch


def sides(model: Model, sizes: Sequence[int]) -> dict[int, int]:
    """Size of a row -> side at which a model is measured for it."""
    if model.at is None:
        return {model.size: model.size}
    return {size: nearest_side(model, size) for size in sizes}


def at_side(model: Model, side: int, until: ExitStack) -> list[Model]:
    """The model for images of another side, freed at the end of `until`; itself at its own.

    Empty, with a line that says why, if it cannot be built for that side.
    """
    if side == model.size:
        return [model]
    assert model.at is not None
    try:
        built = model.at(side)
    except ValueError as error:
        console.say(f"{model.name} is not measured at {side} px: {error}")
        return []
    if built.frees:
        until.callback(built.frees)
    return [replace(built, name=model.name, role=model.role)]


def nearest_neighbours(
    models: Sequence[Model], data: EvalData, sizes: Sequence[int]
) -> Iterator[Score]:
    """Yield kNN by the protocol's first k; all models of one size share a pass over the images."""
    options = replace(data.options, k=data.options.neighbours[:1])
    measured = {model.name: sides(model, sizes) for model in models}
    for size in sorted({size for at in measured.values() for size in at}):
        shown = [model for model in models if size in measured[model.name]]
        own = [model for model in shown if measured[model.name][size] == model.size]
        for score in KNN().evaluate(own, replace(data, options=options)) if own else ():
            yield score._replace(name=f"resolutions knn {size}")
        others = [model for model in shown if model not in own]
        with ExitStack() as until:
            built = [
                found
                for model in others
                for found in at_side(model, measured[model.name][size], until)
            ]
            # Features of a model are known by its name: those of another side are kept apart.
            apart = replace(data, options=options, extracted={})
            for score in KNN().evaluate(built, apart) if built else ():
                yield score._replace(name=f"resolutions knn {size}")


def fidelities(
    student: Model, teachers: Sequence[Model], data: EvalData, sizes: Sequence[int]
) -> Iterator[Score]:
    """Yield a student's fidelity to each teacher, the mean of both kinds of token.

    All sizes share a pass over the images.
    """
    with ExitStack() as until:
        built = {}
        for size, side in sides(student, sizes).items():
            name = f"{student.name} {size} px"
            for found in at_side(student, side, until):
                built[name] = size, replace(found, name=name)
        shown = [*teachers, *(model for _, model in built.values())]
        agreed = agreements(shown, data.val, cka=False)
    kinds: dict[tuple[str, str], list[Sums]] = {}
    for pair, sums in agreed.items():
        kinds.setdefault((pair.teacher, pair.student), []).append(sums)
    for (teacher, name), both in kinds.items():
        values = [sums.measures()["fidelity"] for sums in both]
        yield Score(
            student.name,
            f"resolutions {teacher} fidelity {built[name][0]}",
            sum(values) / len(values),
            f"resolutions fidelity: as teacher fidelity, mean of cls and patch, student at"
            f" {both[0].size} px, bicubic map",
            unit="",
            better=MEASURES["fidelity"],
        )
