"""Linear heads on the same features, trained at once by SGD, each with a rate of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unic_ds import dist, rng
from unic_ds.evaluate import softmax
from unic_ds.evaluate.probe import REMEDY, Split
from unic_ds.evaluate.products import product
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

MOMENTUM = 0.9


@dataclass(frozen=True)
class Schedule:
    """Steps of SGD whose rates fall to 0 along a cosine."""

    epochs: int
    batch: int
    """Rows of a step on all ranks together."""
    rows: int
    """Rows of an epoch on all ranks together."""

    @property
    def steps(self) -> int:
        """Number of steps of all epochs."""
        return self.epochs * -(-self.rows // self.batch)

    def factor(self, step: int) -> float:
        """Factor of the rates at a step, from 0."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def batches(self, place_R: Tensor, epoch: int, seed: int) -> list[Tensor]:
        """This rank's rows in each batch of an epoch, by the places of its rows among all.

        The batches are a seeded permutation of all rows, whatever the number of ranks.
        """
        bits_N = rng.random_bits(seed, "linear batches", 1, np.arange(self.rows), epoch)[:, 0]
        order_N = torch.from_numpy(np.argsort(bits_N, kind="stable"))
        row_N = torch.full((self.rows,), -1)
        row_N[place_R] = torch.arange(len(place_R))
        return [row_B[row_B >= 0] for row_B in row_N[order_N].split(self.batch)]


class Heads:
    """P softmax regressions of L classes from weights of 0 (arXiv 2304.07193 trains 13 at once).

    One product gives the logits of all. A head whose loss is not finite does not disturb others.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        rate_P: Tensor,
        decay_P: Tensor,
        spares_P: Tensor | None = None,
    ):
        """`width` of the features with their column of ones.

        `decay_P`: factors of the weights in their gradients (torch's `weight_decay`); `spares_P`:
        True for heads that are not trained on held rows. All on the device.
        """
        self.width, self.classes = width, classes
        self.rate_P, self.decay_P = rate_P, decay_P
        self.spares_P = torch.zeros_like(rate_P, dtype=torch.bool) if spares_P is None else spares_P
        self.weight_PLD = rate_P.new_zeros(len(rate_P), classes, width)
        self.momentum_PLD = torch.zeros_like(self.weight_PLD)
        self.finite_P = torch.ones_like(rate_P, dtype=torch.bool)

    def step(
        self, x_BD: Tensor, class_B: Tensor, *, factor: float, held_B: Tensor | None = None
    ) -> None:
        """Train on this rank's rows of a batch, with the rates times `factor`; every rank calls it.

        `held_B`: True for rows on which the sparing heads are not trained.
        """
        with raised_on_all_ranks("the linear probe", REMEDY):
            flat = self.sums(x_BD, class_B, held_B)
        flat = dist.all_reduce_sum(flat)
        heads = len(self.rate_P)
        grad, loss_P, count_P = flat.split([self.weight_PLD.numel(), heads, heads])
        count_P = count_P.clamp(min=1)
        self.finite_P &= loss_P.isfinite()
        grad_PLD = grad.view_as(self.weight_PLD).div_(count_P[:, None, None])
        grad_PLD.addcmul_(self.weight_PLD, self.decay_P[:, None, None])
        self.momentum_PLD.mul_(MOMENTUM).add_(grad_PLD)
        self.weight_PLD.addcmul_(self.momentum_PLD, self.rate_P[:, None, None], value=-factor)

    def sums(self, x_BD: Tensor, class_B: Tensor, held_B: Tensor | None) -> Tensor:
        """Gradient (P * L * D) of this rank's rows, their losses (P) and their number (P)."""
        # Rows last: over few classes that are neighbours a softmax takes as long as a product.
        logit_PL_B = product(self.weight_PLD.flatten(0, 1), x_BD)
        log_PLB = logit_PL_B.unflatten(0, (-1, self.classes)).log_softmax(1)
        label_P1B = class_B.expand(len(self.rate_P), 1, -1)
        loss_PB = -log_PLB.gather(1, label_P1B).squeeze(1)
        delta_PLB = log_PLB.exp_()
        delta_PLB.scatter_add_(1, label_P1B, torch.full_like(loss_PB, -1.0)[:, None])
        use_PB = torch.ones_like(loss_PB)
        if held_B is not None:
            use_PB = (~(self.spares_P[:, None] & held_B)).float()
            delta_PLB *= use_PB[:, None]
        grad_PL_D = product(delta_PLB.flatten(0, 1), x_BD.T)
        return torch.cat([grad_PL_D.flatten(), (loss_PB * use_PB).sum(1), use_PB.sum(1)])

    def accuracies(self, tested: Split) -> list[float]:
        """Accuracy in % of each head on all ranks' rows; -1 for one with a loss not finite."""
        weight_PN = self.weight_PLD.mT.flatten(1)
        (points,) = softmax.accuracies([tested], [weight_PN], self.classes)
        finite = self.finite_P.tolist()
        return [value if ok else -1.0 for value, ok in zip(points, finite, strict=True)]


def log_uniform(
    least: float, most: float, *, count: int, seed: int, name: str, device: torch.device
) -> Tensor:
    """`count` seeded numbers between two bounds, log-uniform, in fp32."""
    share_P = rng.uniform(seed, name, 1, np.arange(count))[:, 0]
    value_P = np.exp(np.log(least) + share_P * (np.log(most) - np.log(least)))
    return torch.from_numpy(value_P).float().to(device)
