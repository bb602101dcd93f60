"""L-BFGS for many convex problems at once, on all ranks (Liu and Nocedal 1989).

The products of the last steps and gradients with each other are all that the two-loop recursion
needs (Chen et al. 2014, "vector-free L-BFGS"): they are computed on the device in one product, and
averaged over the ranks, so that all take the same decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import dist

MEMORY = 10
"""Steps that are remembered."""
DECREASE = 1e-4
"""Least decrease, as a part of that which the slope promises (Armijo)."""
ROUNDING = 1e-7
"""A decrease below this part of the loss is lost in its rounding: the step is taken."""
SHORTEST = 1e-8
"""Step length below which a problem cannot be improved in fp32."""

Objective = Callable[[Sequence[Tensor], Sequence[NDArray[np.bool_]]], tuple[Tensor, list[Tensor]]]
"""Losses (A, fp64) and gradients, on every rank, of the problems that the masks choose.

It takes and returns a tensor (a, N) for each group of problems of equally many weights.
"""


class Progress(NamedTuple):
    """Losses of all P problems, and the sizes of their gradients, in fp64."""

    loss_P: NDArray[np.float64]
    square_P: NDArray[np.float64]
    """Squared length of the gradient."""
    largest_P: NDArray[np.float64]
    """Largest magnitude of an entry of the gradient."""


Enough = Callable[[Progress], NDArray[np.bool_]]
"""Mask (P) of the problems that have converged."""


def small_excess(convexity_P: NDArray[np.float64], tolerance: float) -> Enough:
    """True where the loss exceeds its minimum by at most `tolerance` times itself.

    The loss of problem p has a curvature of at least `convexity_P[p]`, so it exceeds its minimum by
    at most |gradient|^2 / (2 convexity).
    """
    return lambda at: at.square_P <= 2 * tolerance * convexity_P * at.loss_P


def small_gradient(largest: float) -> Enough:
    """True where no entry of the gradient is larger, as L-BFGS ends in SciPy (its `gtol`)."""
    return lambda at: at.largest_P <= largest


class Group:
    """Problems of equally many weights N, one a row."""

    def __init__(self, start_SN: Tensor):
        self.weight_SN = start_SN.clone()
        self.direction_SN = torch.zeros_like(start_SN)
        # The last MEMORY steps, as many changes of the gradient, and the gradient.
        shape = (len(start_SN), 2 * MEMORY + 1, start_SN.shape[1])
        self.row_SKN = start_SN.new_zeros(shape)

    def trial(self, active_S: NDArray[np.bool_], length_S: NDArray[np.float64]) -> Tensor:
        """Weights (A, N) of the active problems one step on."""
        at = index(active_S, self.weight_SN)
        length_A1 = self.weight_SN.new_tensor(length_S[active_S])[:, None]
        return self.weight_SN[at] + length_A1 * self.direction_SN[at]

    def take(
        self,
        active_S: NDArray[np.bool_],
        taken_S: NDArray[np.bool_],
        slot_S: NDArray[np.int64],
        trial_AN: Tensor,
        grad_AN: Tensor,
    ) -> None:
        """Move some of the active problems to their trial weights.

        Step and change of the gradient go into their slots.
        """
        chosen, at = index(taken_S[active_S], trial_AN), index(taken_S, trial_AN)
        weight_AN, grad_AN = trial_AN[chosen], grad_AN[chosen]
        slot = torch.from_numpy(slot_S[taken_S]).to(at.device)
        self.row_SKN[at, slot] = weight_AN - self.weight_SN[at]
        self.row_SKN[at, slot + MEMORY] = grad_AN - self.row_SKN[at, 2 * MEMORY]
        self.row_SKN[at, 2 * MEMORY] = grad_AN
        self.weight_SN[at] = weight_AN

    def products(self) -> Tensor:
        """Products of all rows with each other, (S, 2 * MEMORY + 1, 2 * MEMORY + 1) in fp64."""
        return (self.row_SKN @ self.row_SKN.mT).double()

    def largest(self) -> Tensor:
        """Largest magnitude (S) of an entry of each gradient, in fp64."""
        return self.row_SKN[:, 2 * MEMORY].abs().amax(1).double()

    def turn(self, factor_SK: NDArray[np.float64]) -> None:
        """Set the directions to these sums of the rows."""
        factor_S1K = self.row_SKN.new_tensor(factor_SK)[:, None]
        self.direction_SN = (factor_S1K @ self.row_SKN)[:, 0]


class Solution(NamedTuple):
    """Weights of each group of problems, and a mask (P) of the problems that converged."""

    weights: list[Tensor]
    converged_P: NDArray[np.bool_]


class Steps:
    """Losses and step lengths of all P problems, on the host."""

    def __init__(self, count: int):
        self.count_P = np.zeros(count, np.int64)  # steps taken; the first is to the start
        self.length_P, self.slope_P = np.zeros(count), np.zeros(count)
        self.loss_P = np.full(count, np.inf)
        self.active_P, self.converged_P = np.ones(count, bool), np.zeros(count, bool)

    def judge(self, loss_A: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Mask (P) of the steps that are taken, by the losses after them; others get shorter."""
        new_P = np.full_like(self.loss_P, np.inf)
        new_P[self.active_P] = loss_A
        promised_P, first_P = self.length_P * self.slope_P, self.count_P == 0
        most_P = self.loss_P + DECREASE * promised_P + ROUNDING * self.loss_P
        taken_P = self.active_P & (first_P | (new_P <= most_P))
        left_P = self.active_P & ~taken_P
        with np.errstate(invalid="ignore", divide="ignore"):
            # The minimum of the parabola through both losses and the slope.
            factor_P = -promised_P / (2 * (new_P - self.loss_P - promised_P))
        factor_P = np.clip(np.nan_to_num(factor_P, nan=0.1), 0.1, 0.5)
        self.length_P[left_P] *= factor_P[left_P]
        self.loss_P[taken_P] = new_P[taken_P]
        self.count_P[taken_P] += 1
        return taken_P

    def end(self, enough_P: NDArray[np.bool_]) -> None:
        """Leave out problems that have converged, or that are stuck."""
        self.converged_P |= self.active_P & enough_P
        stuck_P = (self.count_P > 1) & (self.length_P < SHORTEST)
        self.active_P &= ~self.converged_P & ~stuck_P

    def begin(self, taken_P: NDArray[np.bool_], square_P: NDArray[np.float64]) -> None:
        """Set the lengths of the steps that follow those taken."""
        first_P = 1 / np.maximum(1, square_P**0.5)
        length_P = np.where(self.count_P == 1, first_P, 1.0)
        self.length_P[taken_P] = length_P[taken_P]


def minimise(
    objective: Objective,
    start: Sequence[Tensor],
    *,
    enough: Enough,
    evaluations: int,
) -> Solution:
    """Minimise convex, positive functions from `start`, groups of problems (S, N).

    Each evaluation of the objective moves every problem that has not converged (`enough`), by a
    step of its own length. Every rank calls it; all take the same decisions.
    """
    groups = [Group(weight_SN) for weight_SN in start]
    ends = np.cumsum([len(weight_SN) for weight_SN in start])
    steps = Steps(int(ends[-1]))
    ends = ends[:-1]
    for _ in range(evaluations):
        actives = np.split(steps.active_P, ends)
        lengths = np.split(steps.length_P, ends)
        trials = [g.trial(*found) for g, *found in zip(groups, actives, lengths, strict=True)]
        losses, grads = objective(trials, actives)
        slots = np.split((steps.count_P - 1) % MEMORY, ends)
        taken_P = steps.judge(losses.cpu().numpy())
        takens = np.split(taken_P, ends)
        for group, active_S, *moved in zip(
            groups, actives, takens, slots, trials, grads, strict=True
        ):
            group.take(active_S, *moved)
        product_PKK = average(torch.cat([group.products() for group in groups]))
        largest_P = average(torch.cat([group.largest() for group in groups]))
        square_P = product_PKK[:, -1, -1]
        steps.end(enough(Progress(steps.loss_P, square_P, largest_P)))
        if not steps.active_P.any():
            break
        factor_PK, steps.slope_P = downhill(product_PKK, steps.count_P - 1)
        for group, factor_SK in zip(groups, np.split(factor_PK, ends), strict=True):
            group.turn(factor_SK)
        steps.begin(taken_P, square_P)
    return Solution([group.weight_SN for group in groups], steps.converged_P)


def average(values: Tensor) -> NDArray[np.float64]:
    """The mean of the ranks' values, which differ by rounding on unlike devices."""
    return (dist.all_reduce_sum(values) / dist.world()).cpu().numpy()


def downhill(
    product_PKK: NDArray[np.float64], pairs_P: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions as sums of a problem's rows, and the slopes along them."""
    factor_PK = two_loops(product_PKK, pairs_P)
    slope_P = (factor_PK * product_PKK[:, -1]).sum(1)
    uphill_P = slope_P >= 0  # by rounding: against the gradient instead
    factor_PK[uphill_P] = steepest(product_PKK)[uphill_P]
    return factor_PK, np.where(uphill_P, -product_PKK[:, -1, -1], slope_P)


def two_loops(product_PKK: NDArray[np.float64], pairs_P: NDArray[np.int64]) -> NDArray[np.float64]:
    """L-BFGS directions as sums of a problem's rows, from the rows' products.

    The last of `pairs_P` pairs is in slot (pairs - 1) % MEMORY. A pair along which the gradient
    does not grow, by rounding, is left out.
    """
    p = np.arange(len(pairs_P))
    factor_PK = steepest(product_PKK)
    ages = []
    for age in range(min(MEMORY, int(pairs_P.max()))):
        step_P = (pairs_P - 1 - age) % MEMORY
        change_P = step_P + MEMORY
        along_P = product_PKK[p, step_P, change_P]
        use_P = (pairs_P > age) & (along_P > 0)
        ages.append((step_P, change_P, np.where(use_P, along_P, 1.0), use_P))
    first: list[NDArray[np.float64]] = []
    for step_P, change_P, along_P, use_P in ages:
        first.append(use_P * (factor_PK * product_PKK[p, step_P]).sum(1) / along_P)
        factor_PK[p, change_P] -= first[-1]
    for _, change_P, along_P, use_P in ages[:1]:  # the newest sets the scale
        square_P = np.where(use_P, product_PKK[p, change_P, change_P], 1.0)
        factor_PK *= np.where(use_P, along_P / square_P, 1.0)[:, None]
    for (step_P, change_P, along_P, use_P), alpha_P in reversed(
        list(zip(ages, first, strict=True))
    ):
        beta_P = use_P * (factor_PK * product_PKK[p, change_P]).sum(1) / along_P
        factor_PK[p, step_P] += alpha_P - beta_P
    return factor_PK


def steepest(product_PKK: NDArray[np.float64]) -> NDArray[np.float64]:
    """The direction against the gradient, the last row, for each problem."""
    factor_PK = np.zeros(product_PKK.shape[:2])
    factor_PK[:, -1] = -1.0
    return factor_PK


def index(mask_S: NDArray[np.bool_], like: Tensor) -> Tensor:
    """Places of a mask's true entries, on the device of `like`."""
    return torch.from_numpy(np.flatnonzero(mask_S)).to(like.device)
