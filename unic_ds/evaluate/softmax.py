"""Softmax regressions with an L2 penalty, of several models and penalties at once, on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import dist
from unic_ds.evaluate import lbfgs
from unic_ds.evaluate.probe import REMEDY, ROWS, Split
from unic_ds.evaluate.products import block_on, product
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.process import console

TOLERANCE = 1e-5
"""Bound of a fitted loss's excess over its minimum, as a part of it (`lbfgs.excess`)."""
EVALUATIONS = 3000
GRADIENT, ITERATIONS = 1e-4, 2000
"""Largest entry of the gradient at which scikit-learn stops (its `tol`), and UNIC's `max_iter`."""
LOGITS = 2**24
"""Logits that are held at once: 64 MB, and as much again for their gradient; less on a CPU."""


def fit(
    splits: Sequence[Split],
    strengths: Sequence[Sequence[float]],
    classes: int,
    start: Sequence[Tensor] | None = None,
    *,
    as_sklearn: bool = False,
) -> list[Tensor]:
    """Weights (S, D * L) of each split's softmax regressions, one for each of its strengths.

    A strength is scikit-learn's C, the inverse penalty of the summed loss. Two classes have the
    solution of its regression with one weight a channel. `as_sklearn`: a fit ends where
    scikit-learn's does, which is short of the minimum if the penalty is weak.
    """
    rows = int(dist.all_reduce_sum(torch.tensor(len(splits[0].x_RD))))
    both = 2 if classes == 2 else 1  # as the one weight is the difference of ours
    penalties = [both / (rows * np.array(found)) for found in strengths]
    if start is None:
        start = [
            split.x_RD.new_zeros(len(found), split.x_RD.shape[1] * classes)
            for split, found in zip(splits, strengths, strict=True)
        ]
    enough, most = lbfgs.small_gradient(GRADIENT), ITERATIONS
    if not as_sklearn:
        counts_L = dist.all_reduce_sum(torch.bincount(splits[0].class_R, minlength=classes))
        # The biases have no penalty: the loss's own curvature is that of the rarest class or more
        # while the probabilities are near the classes' shares, as strong penalties leave them.
        convexity_P = np.minimum(np.concatenate(penalties), int(counts_L.min()) / rows)
        enough, most = lbfgs.small_excess(convexity_P, TOLERANCE), EVALUATIONS
    regressions = Regressions(splits, penalties, classes, rows)
    found = lbfgs.minimise(regressions, start, enough=enough, evaluations=most)
    stopped = int((~found.converged_P).sum())
    if stopped and not as_sklearn:
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
    # One product for all regressions of a model. Rows last: over few classes that are neighbours a
    # softmax takes longer on a CPU than the product.
    weight_AL_D = weight_AN.view(count, width, classes).mT.flatten(0, 1)
    grad_AL_D = torch.zeros_like(weight_AL_D)
    rows = max(1, block_on(weight_AN.device, LOGITS) // len(weight_AL_D))
    for x_RD, class_R in zip(split.x_RD.split(rows), split.class_R.split(rows), strict=True):
        log_ALR = product(weight_AL_D, x_RD).unflatten(0, (count, classes)).log_softmax(1)
        label_A1R = class_R.expand(count, 1, -1)
        loss_A -= log_ALR.gather(1, label_A1R).squeeze(1).sum(1, dtype=torch.float64)
        delta_ALR = log_ALR.exp_()
        delta_ALR.scatter_(1, label_A1R, delta_ALR.gather(1, label_A1R) - 1)
        grad_AL_D += product(delta_ALR.flatten(0, 1), x_RD.T)
    return loss_A, grad_AL_D.view(count, classes, width).mT.flatten(1)


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
            for x_RD, class_R in zip(*(x.split(ROWS) for x in split), strict=True):
                hits_S += ((x_RD @ weight_SDL).argmax(2) == class_R).sum(1)
            counts.append(hits_S)
    total = dist.all_reduce_sum(torch.tensor(len(splits[0].x_RD)))
    hits = (100 * dist.all_reduce_sum(torch.cat(counts)).double().cpu() / total).tolist()
    found = iter(hits)
    return [[next(found) for _ in weight_SN] for weight_SN in weights]
