"""Linear probe: softmax regression on standardised features, its penalty chosen on a hold-out.

All models and all penalties are fitted at once on all ranks, each with the images that it counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist, rng
from unic_ds.evaluate import lbfgs
from unic_ds.evaluate.evaluator import images_used
from unic_ds.evaluate.features import Annotation, EvalData, FeatureSet, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.table import Score
from unic_ds.process import console

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates of scikit-learn's C, the inverse penalty of the summed loss, weakest model first."""
HELD_OUT = 0.2
TOLERANCE = 1e-5
"""Bound of a fitted loss's excess over its minimum, as a part of it (`lbfgs.minimise`)."""
EVALUATIONS = 3000
LOGITS = 2**24
"""Logits that are held at once: 64 MB, and as much again for their gradient."""
REMEDY = "lower --eval.max_train"


class Linear:
    """Accuracy in % of a linear probe."""

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `linear` of each model."""
        train, val = (side.labelled() for side in data.features(models))
        found = linear_accuracies(train, val, seed=data.seed, device=data.device)
        grid = ",".join(f"{strength:g}" for strength in STRENGTHS)
        rule = f"linear softmax L2 C={grid} on {HELD_OUT:.0%} held out, standardised"
        for model in models:
            used = images_used(len(train.label_N), len(val.label_N), model)
            yield Score(model.name, "linear", found[model.name], f"{rule} {used}")


class Split(NamedTuple):
    """A model's features of this rank's rows, standardised, and their classes."""

    x_RD: Tensor
    """fp32 (R, C + 1); the last column is 1."""
    class_R: Tensor
    """Place of the row's label among the training labels, -1 if it is none of them."""


def linear_accuracies(
    train: FeatureSet, val: FeatureSet, *, seed: int, device: torch.device
) -> dict[str, float]:
    """Model -> accuracy in %; every rank calls it with the same models, and rows that have labels.

    C is chosen for each model on a seeded 20 % of the training rows; the regression is then fitted
    to all of them and tested once. ValueError if the training rows are of one class.
    """
    label_L = train.label_N.unique()
    if len(label_L) < 2:
        raise ValueError(
            "a linear probe wants training images of at least two classes; set --eval.on false"
        )
    class_R, val_class_R = (classes_of(side.label_R, label_L) for side in (train, val))
    strengths, start = choose(train, class_R, seed=seed, classes=len(label_L), device=device)
    pairs = []
    for name, x_RC in train.cls.items():
        kept, tested = Split(x_RC, class_R), Split(val.cls[name], val_class_R)
        pairs.append(standardised(kept, tested, device, name))
    weights = fit([kept for kept, _ in pairs], strengths, len(label_L), start)
    points = accuracies([tested for _, tested in pairs], weights, len(label_L))
    return {name: found[0] for name, found in zip(train.cls, points, strict=True)}


def choose(
    train: FeatureSet, class_R: Tensor, *, seed: int, classes: int, device: torch.device
) -> tuple[list[tuple[float, ...]], list[Tensor] | None]:
    """Each model's C, the most accurate on the hold-out, and the weights (1, D * L) fitted there.

    Of equals the strongest penalty; without a hold-out the middle one, and no weights.
    """
    held_N = torch.from_numpy(hold_out(train.label_N.numpy(), seed))
    if not held_N.any():
        return [(STRENGTHS[len(STRENGTHS) // 2],)] * len(train.cls), None
    held_R = held_N[train.place_R]
    pairs = []
    for name, x_RC in train.cls.items():
        kept, held = (Split(x_RC[mask_R], class_R[mask_R]) for mask_R in (~held_R, held_R))
        pairs.append(standardised(kept, held, device, name))
    weights = fit([kept for kept, _ in pairs], [STRENGTHS] * len(pairs), classes)
    points = accuracies([held for _, held in pairs], weights, classes)
    best = [values.index(max(values)) for values in points]  # the first of equals
    start = [weight_SN[at : at + 1] for at, weight_SN in zip(best, weights, strict=True)]
    return [(STRENGTHS[at],) for at in best], start


def hold_out(label_N: NDArray[np.integer], seed: int) -> NDArray[np.bool_]:
    """Mask of a seeded fifth of each class; one row of every class always stays."""
    order_N = np.argsort(rng.uniform(seed, "linear", 1, np.arange(len(label_N)))[:, 0])
    held_N = np.zeros(len(label_N), dtype=bool)
    for label in np.unique(label_N):
        rows = order_N[label_N[order_N] == label]
        held_N[rows[: min(round(HELD_OUT * len(rows)), len(rows) - 1)]] = True
    return held_N


def classes_of(label_R: Tensor, label_L: Tensor) -> Tensor:
    """Places of labels in the ascending `label_L`, -1 for one that is not there."""
    class_R = torch.searchsorted(label_L, label_R).clamp(max=len(label_L) - 1)
    return class_R.where(label_L[class_R] == label_R, -1)


def standardised(
    fitted: Split, tested: Split, device: torch.device, name: str
) -> tuple[Split, Split]:
    """Both splits on the device, with mean 0 and deviation 1 over all ranks' rows of the first.

    A channel that fp32 cannot tell from a constant stays 0.
    """
    with raised_on_all_ranks(f"the linear probe of {name!r}", REMEDY):
        fitted, tested = (Split(*(x.to(device) for x in part)) for part in (fitted, tested))
        sum_C = fitted.x_RD.sum(0, dtype=torch.float64)
        count = sum_C.new_tensor([len(fitted.x_RD)])
    sum_C, count = dist.all_reduce_sum(torch.cat([sum_C, count])).split([len(sum_C), 1])
    mean_C = sum_C / count
    with raised_on_all_ranks(f"the linear probe of {name!r}", REMEDY):
        square_C = torch.zeros_like(mean_C)
        for x_RC in fitted.x_RD.split(4096):
            square_C += (x_RC - mean_C).square().sum(0)
    std_C = (dist.all_reduce_sum(square_C) / count).sqrt()
    std_C[std_C <= torch.finfo(torch.float32).eps * mean_C.abs()] = torch.inf
    with raised_on_all_ranks(f"the linear probe of {name!r}", REMEDY):
        mean_C, std_C = mean_C.float(), std_C.float()
        found = [
            Split(F.pad((part.x_RD - mean_C) / std_C, (0, 1), value=1.0), part.class_R)
            for part in (fitted, tested)
        ]
    return found[0], found[1]


def fit(
    splits: Sequence[Split],
    strengths: Sequence[Sequence[float]],
    classes: int,
    start: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Weights (S, D * L) of each split's softmax regressions, one for each of its strengths.

    Two classes have the solution of scikit-learn's regression with one weight a channel.
    """
    rows = int(dist.all_reduce_sum(torch.tensor(len(splits[0].x_RD))))
    both = 2 if classes == 2 else 1  # as the one weight is the difference of ours
    penalties = [both / (rows * np.array(found)) for found in strengths]
    if start is None:
        start = [
            split.x_RD.new_zeros(len(found), split.x_RD.shape[1] * classes)
            for split, found in zip(splits, strengths, strict=True)
        ]
    counts_L = dist.all_reduce_sum(torch.bincount(splits[0].class_R, minlength=classes))
    # The biases have no penalty: the loss's own curvature is that of the rarest class or more
    # while the probabilities are near the classes' shares, as strong penalties leave them.
    rarest = int(counts_L.min()) / rows
    found = lbfgs.minimise(
        Regressions(splits, penalties, classes, rows),
        start,
        convexity_P=np.minimum(np.concatenate(penalties), rarest),
        tolerance=TOLERANCE,
        evaluations=EVALUATIONS,
    )
    if stopped := int((~found.converged_P).sum()):
        total = len(found.converged_P)
        console.say(f"linear probe: {stopped} of {total} fits stopped before they had converged")
    return found.weights


@dataclass(frozen=True)
class Regressions:
    """The objective of all softmax regressions: mean cross-entropy + penalty / 2 |weights|^2."""

    splits: Sequence[Split]
    penalties: Sequence[NDArray[np.float64]]
    classes: int
    rows: int
    """Of a split on all ranks."""

    def __call__(
        self, trials: Sequence[Tensor], actives: Sequence[NDArray[np.bool_]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Losses (A, fp64) and gradients of the regressions that the masks choose."""
        with raised_on_all_ranks("the linear probe", REMEDY):
            found = [
                entropy(split, weight_AN, self.classes)
                for split, weight_AN in zip(self.splits, trials, strict=True)
            ]
            share_A = torch.cat([loss_A for loss_A, _ in found])
            flat = torch.cat([grad_AN.flatten() for _, grad_AN in found])
        losses = list((dist.all_reduce_sum(share_A) / self.rows).split([len(w) for w in trials]))
        flat = dist.all_reduce_sum(flat) / self.rows
        grads = [
            part.view_as(weight_AN)
            for part, weight_AN in zip(flat.split([w.numel() for w in trials]), trials, strict=True)
        ]
        for at, (penalty_S, active_S) in enumerate(zip(self.penalties, actives, strict=True)):
            weight_AN = trials[at][:, : -self.classes]  # all but the biases
            penalty_A = share_A.new_tensor(penalty_S[active_S])
            losses[at] = losses[at] + penalty_A / 2 * weight_AN.double().square().sum(1)
            grads[at][:, : -self.classes] += penalty_A[:, None].float() * weight_AN
        return torch.cat(losses), grads


def entropy(split: Split, weight_AN: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy (A, fp64) of this rank's rows, summed, and its gradient (A, D * L)."""
    count, width = len(weight_AN), split.x_RD.shape[1]
    loss_A = weight_AN.new_zeros(count, dtype=torch.float64)
    if not count:
        return loss_A, weight_AN
    # One product for all regressions of a model.
    weight_D_AL = weight_AN.view(count, width, classes).transpose(0, 1).flatten(1)
    grad_D_AL = torch.zeros_like(weight_D_AL)
    rows = max(1, LOGITS // weight_D_AL.shape[1])
    for x_RD, class_R in zip(split.x_RD.split(rows), split.class_R.split(rows), strict=True):
        log_RAL = (x_RD @ weight_D_AL).unflatten(1, (count, classes)).log_softmax(2)
        label_RA1 = class_R[:, None, None].expand(-1, count, 1)
        loss_A -= log_RAL.gather(2, label_RA1).squeeze(2).sum(0, dtype=torch.float64)
        delta_RAL = log_RAL.exp_()
        delta_RAL.scatter_(2, label_RA1, delta_RAL.gather(2, label_RA1) - 1)
        grad_D_AL += x_RD.T @ delta_RAL.flatten(1)
    return loss_A, grad_D_AL.view(width, count, classes).transpose(0, 1).flatten(1)


def accuracies(
    splits: Sequence[Split], weights: Sequence[Tensor], classes: int
) -> list[list[float]]:
    """Shares of all ranks' rows, in %, that get their own class: of each split and regression."""
    counts = []
    with raised_on_all_ranks("the linear probe", REMEDY):
        for split, weight_SN in zip(splits, weights, strict=True):
            width = split.x_RD.shape[1]
            weight_SDL = weight_SN.view(-1, width, classes)
            hits_S = split.class_R.new_zeros(len(weight_SN))
            for x_RD, class_R in zip(*(x.split(4096) for x in split), strict=True):
                hits_S += ((x_RD @ weight_SDL).argmax(2) == class_R).sum(1)
            counts.append(hits_S)
    total = dist.all_reduce_sum(torch.tensor(len(splits[0].x_RD)))
    hits = (100 * dist.all_reduce_sum(torch.cat(counts)).double().cpu() / total).tolist()
    found = iter(hits)
    return [[next(found) for _ in weight_SN] for weight_SN in weights]
