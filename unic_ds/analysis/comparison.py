"""Comparison of frozen teachers by their features on the same images; on one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from unic_ds.analysis import leave_one_out, selection, similarity
from unic_ds.analysis.coverage import Coverage, Features
from unic_ds.analysis.leave_one_out import ClassRow
from unic_ds.analysis.selection import Selection
from unic_ds.analysis.spectrum import Spectrum, spectrum_of
from unic_ds.process import console
from unic_ds.tokens import KINDS


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Likeness of two teachers by one kind of token."""

    first: str
    second: str
    kind: str
    cka: float
    mutual_knn: float
    r2_of_first: float
    """Held-out R^2 of the first teacher's features, from the second's."""
    r2_of_second: float


@dataclass(frozen=True, kw_only=True)
class Without:
    """The chosen teachers without one of them."""

    teacher: str
    coverage: float
    knn: float | None
    """Leave-one-out kNN accuracy in %; None without labels or a teacher that remains."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Leave-one-out kNN accuracy of each teacher by its summary token, in %."""

    images: int
    accuracy: dict[str, float]
    classes: list[ClassRow]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All figures of a comparison."""

    images: int
    spectra: dict[str, dict[str, Spectrum]]
    """Teacher -> kind of token -> spectrum."""
    pairs: list[Pair]
    labelled: Labelled | None
    selection: Selection
    coverage: float
    """Of the chosen teachers."""
    knn: float | None
    without: list[Without]


@dataclass(frozen=True)
class Labels:
    """Class of each image (N), -1 for none, and the classes' names."""

    label_N: Tensor
    classes: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """True if two classes or more have two images or more."""
        kept_N = leave_one_out.judged(self.label_N)
        return len(self.label_N[kept_N].unique()) > 1


def compare(
    features: Features,
    labels: Labels,
    costs: Mapping[str, float],
    *,
    budget: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare teachers by features of the kinds `tokens.KINDS`; prints its progress.

    `costs` are in GFLOPs an image, like `budget`. ValueError if no teacher fits that.
    """
    selection.check_budget(costs, budget)
    console.say("spectra of each teacher")
    spectra = {
        name: {kind: spectrum_of(x_NMC.flatten(0, 1)) for kind, x_NMC in of.items()}
        for name, of in features.items()
    }
    console.say("regressions between the teachers")
    coverage = Coverage(features, seed=seed)
    pairs = [pair for kind in KINDS for pair in pairs_of(features, kind, coverage)]
    console.say("selection of teachers")
    chosen = selection.greedy(list(features), coverage.of, costs, budget=budget)
    summaries = {name: of["cls"].flatten(1) for name, of in features.items()}
    usable = labels if labels.usable else None
    return Comparison(
        images=len(labels.label_N),
        spectra=spectra,
        pairs=pairs,
        labelled=strengths(summaries, usable) if usable else None,
        selection=chosen,
        coverage=coverage.of(chosen.chosen),
        knn=joint_accuracy(summaries, chosen.chosen, usable),
        without=leave_each_out(chosen.chosen, coverage, summaries, usable),
    )


def pairs_of(features: Features, kind: str, coverage: Coverage) -> list[Pair]:
    """Likeness of each pair of teachers by one kind of token.

    Neighbours are those of images: the tokens of an image stand side by side.
    """
    tokens = {name: of[kind].flatten(0, 1) for name, of in features.items()}
    cka = similarity.linear_cka(tokens)
    near = {name: similarity.nearest_others(of[kind].flatten(1)) for name, of in features.items()}
    found = list(combinations(features, 2))
    return [
        Pair(
            first=first,
            second=second,
            kind=kind,
            cka=cka[first, second],
            mutual_knn=similarity.mutual_neighbours(near[first], near[second]),
            r2_of_first=coverage.r2(frozenset({second}), first, kind),
            r2_of_second=coverage.r2(frozenset({first}), second, kind),
        )
        for first, second in console.track(found, len(found), f"pairs of teachers, {kind}")
    ]


def strengths(summaries: Mapping[str, Tensor], labels: Labels) -> Labelled:
    """Accuracy of each teacher, on all images and on those of each class."""
    kept_N = leave_one_out.judged(labels.label_N)
    label_M = labels.label_N[kept_N]
    hit_M = {name: leave_one_out.hits(x_NC[kept_N], label_M) for name, x_NC in summaries.items()}
    return Labelled(
        images=len(label_M),
        accuracy={name: leave_one_out.percent(x_M) for name, x_M in hit_M.items()},
        classes=leave_one_out.by_class(hit_M, label_M, labels.classes),
    )


def joint_accuracy(
    summaries: Mapping[str, Tensor], chosen: Sequence[str], labels: Labels | None
) -> float | None:
    """Accuracy in % of some teachers' summaries side by side; None without labels or teachers."""
    if labels is None or not chosen:
        return None
    kept_N = leave_one_out.judged(labels.label_N)
    x_MC = leave_one_out.side_by_side({name: summaries[name][kept_N] for name in chosen})
    return leave_one_out.percent(leave_one_out.hits(x_MC, labels.label_N[kept_N]))


def leave_each_out(
    chosen: Sequence[str],
    coverage: Coverage,
    summaries: Mapping[str, Tensor],
    labels: Labels | None,
) -> list[Without]:
    """Coverage and accuracy of the chosen teachers without each of them."""
    found = []
    for teacher in chosen:
        rest = [name for name in chosen if name != teacher]
        knn = joint_accuracy(summaries, rest, labels)
        found.append(Without(teacher=teacher, coverage=coverage.of(rest), knn=knn))
    return found


def cosines(gram_TT: Tensor) -> Tensor:
    """Cosines [T, T] of vectors by their inner products; NaN for one of length 0."""
    norm_T = gram_TT.diagonal().clamp(min=0).sqrt()
    return gram_TT / torch.outer(norm_T, norm_T)
