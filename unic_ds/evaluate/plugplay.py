"""A teacher's own classifier on the student's predictions of its tokens (arXiv 2408.05088)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, Classifier, ImageSet, Model, ModelOutput
from unic_ds.evaluate.projected import (
    WNID,
    Head,
    accuracies,
    class_numbers,
    imagenet_ids,
)
from unic_ds.process import console
from unic_ds.tokens import Tokens


class PlugPlay:
    """Accuracy in % of the teachers' classifiers, of their own tokens and of predicted ones."""

    model_needs: frozenset[ModelOutput] = frozenset({"projection"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def check(self, data: EvalData) -> None:
        """Raise ValueError unless the set's classes are those of each classifier."""
        for teacher, classifier in data.classifiers.items():
            restricted(classifier, data.val, teacher)

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `plugplay TEACHER` of each model.

        ValueError unless the set's classes are those of the classifier.
        """
        if not data.classifiers:
            console.say("not evaluated by plugplay, which needs a teacher with a classifier")
            return
        heads = {
            teacher: Head(restricted(classifier, data.val, teacher), classifier.kinds)
            for teacher, classifier in data.classifiers.items()
        }
        for found in accuracies(models, data.val, heads, task="the task plugplay"):
            classes = data.classifiers[found.teacher].classes
            chosen = len(data.val.classes)
            of = f"{classes} classes" if chosen == classes else f"{chosen} of {classes} classes"
            name = f"plugplay {found.teacher}"
            rule = f"{name} top-1 of {of}, {found.images} images {found.model.size} px"
            yield Score(found.model.name, name, found.first, rule)


def restricted(
    classifier: Classifier, images: ImageSet, teacher: str
) -> Callable[[Tokens], Tensor]:
    """Logits of a classifier for the classes of a set, in the order of its labels.

    Folders that are named by WordNet ids are found among ImageNet's classes, all or some of them
    (arXiv 2006.16241), numbered ones by their numbers from 0; other sets must have as many classes
    as the classifier. ValueError if not.
    """
    if all(map(WNID.fullmatch, images.classes)):
        ids = imagenet_ids(classifier.classes)
        strange = next((name for name in images.classes if name not in ids), "")
        if strange:
            raise ValueError(
                f"{images.name!r} has the class {strange}, which is none of the"
                f" {classifier.classes} classes of {teacher}'s classifier; take another set"
            )
        return chosen(classifier, [ids.index(name) for name in images.classes])
    if numbers := class_numbers(images.classes):
        if max(numbers) >= classifier.classes:
            raise ValueError(
                f"{images.name!r} has the class {max(numbers)}, but the {classifier.classes}"
                f" classes of {teacher}'s classifier are numbered from 0; take another set"
            )
        return chosen(classifier, numbers)
    if len(images.classes) != classifier.classes:
        raise ValueError(
            f"{images.name!r} has {len(images.classes)} classes, {teacher}'s classifier"
            f" {classifier.classes}; name the folders by WordNet ids or take another set"
        )
    return classifier.logits


def chosen(classifier: Classifier, places: Sequence[int]) -> Callable[[Tokens], Tensor]:
    """Logits of a classifier at some places."""
    place_L = torch.tensor(places)
    return lambda tokens: classifier.logits(tokens)[:, place_L]
