"""Balancers that learn from the teachers' losses: AdaLoss and FAMO."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from unic_ds import config, dist
from unic_ds.losses.balancer import Balancer, teacher_weights


class LossBalancer(Balancer):
    """Base class of balancers that learn from each teacher's mean loss over the global batch.

    The mean is known when the step ends, so a step's weights come from the steps before it: they do
    not depend on how its batch is split over ranks and micro batches. A subclass overrides
    `shares` and `learn`.
    """

    sums_2T: Tensor

    def __init__(self, weight_T: Tensor):
        super().__init__(weight_T)
        # Loss and images since the last `track`; empty at every checkpoint.
        sums_2T = torch.zeros(2, len(weight_T), dtype=torch.float64)
        self.register_buffer("sums_2T", sums_2T, persistent=False)

    def observe(self, loss_TB: Tensor) -> None:
        """Add a micro batch's losses, of pairs that are computed."""
        counted_TB = loss_TB != -torch.inf
        sums_2TB = torch.stack([torch.where(counted_TB, loss_TB, 0.0), counted_TB.to(loss_TB)])
        self.sums_2T += sums_2TB.double().sum(2)

    def share(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        self.observe(loss_TB)
        return (self.shares() / loss_TB.numel())[:, None].expand_as(loss_TB)

    @torch.no_grad()
    def track(self, taken: Tensor | None = None) -> None:
        loss_T, images_T = dist.all_gather(self.sums_2T).sum(0)
        mean_T = (loss_T / images_T.clamp(min=1)).float()
        # A skipped step whose loss is not finite must not change the weights either.
        usable = mean_T.isfinite().all()
        usable = usable if taken is None else usable & taken
        self.learn(mean_T, usable & (images_T > 0))
        self.sums_2T.zero_()

    def shares(self) -> Tensor:
        """Each teacher's share [T] in this step's loss, of mean 1."""
        raise NotImplementedError

    def learn(self, mean_T: Tensor, usable_T: Tensor) -> None:
        """Update the state by the global batch's mean losses, where `usable_T`, on the device."""
        raise NotImplementedError


class RunningLosses(LossBalancer):
    """Base class of balancers by each teacher's running loss over the global batch."""

    running_T: Tensor

    def __init__(self, weight_T: Tensor, momentum: float):
        super().__init__(weight_T)
        self.momentum = momentum
        self.register_buffer("running_T", torch.zeros_like(weight_T))  # 0: before the first step

    def learn(self, mean_T: Tensor, usable_T: Tensor) -> None:
        moved_T = self.momentum * self.running_T + (1 - self.momentum) * mean_T
        moved_T = torch.where(self.running_T > 0, moved_T, mean_T)
        self.running_T.copy_(torch.where(usable_T, moved_T, self.running_T))


class AdaLoss(RunningLosses):
    """Weights by the inverse of each teacher's running loss."""

    @classmethod
    def from_config(cls, cfg: config.Config) -> Self:
        return cls(teacher_weights(cfg), cfg.balance.momentum)

    def shares(self) -> Tensor:
        inverse_T = torch.where(self.running_T > 0, 1 / self.running_T, 1.0)
        return inverse_T / inverse_T.mean()


class Famo(LossBalancer):
    """FAMO: logits xi, z = softmax(xi), and the gradient c sum_t z_t grad log l_t.

        c = 1 / sum_t z_t / l_t        so that a teacher's share is c z_t / l_t
        xi <- Adam(xi, J^T (log l before - log l after) + decay xi)        J = d softmax / d xi

    The paper evaluates the losses l of a batch twice, before and after the step. Here "before" is
    the last step that was taken and "after" is this one, whose batch is another: no second forward.
    J^T cancels what the two batches change in all log losses alike. l in the shares is "before".
    """

    BETAS, EPS = (0.9, 0.999), 1e-8

    logit_T: Tensor
    mean_grad_T: Tensor
    mean_square_T: Tensor
    updates: Tensor
    loss_T: Tensor

    def __init__(self, weight_T: Tensor, rate: float, decay: float):
        super().__init__(weight_T)
        self.rate, self.decay = rate, decay
        for name in ("logit_T", "mean_grad_T", "mean_square_T"):  # and Adam's moments
            self.register_buffer(name, torch.zeros_like(weight_T))
        self.register_buffer("updates", torch.zeros((), dtype=torch.float64))
        self.register_buffer("loss_T", torch.zeros_like(weight_T))  # 0: before the first step

    @classmethod
    def from_config(cls, cfg: config.Config) -> Self:
        return cls(teacher_weights(cfg), cfg.balance.rate, cfg.balance.decay)

    def shares(self) -> Tensor:
        share_T = self.logit_T.softmax(0) / torch.where(self.loss_T > 0, self.loss_T, 1.0)
        return share_T / share_T.mean()

    def learn(self, mean_T: Tensor, usable_T: Tensor) -> None:
        mean_T, usable = mean_T.clamp(min=self.EPS), usable_T.all()
        follows = usable & (self.loss_T > 0).all()  # two losses to compare
        z_T, fall_T = self.logit_T.softmax(0), (self.loss_T.clamp(min=self.EPS) / mean_T).log()
        grad_T = z_T * (fall_T - (z_T * fall_T).sum()) + self.decay * self.logit_T
        updates, (beta1, beta2) = self.updates + 1, self.BETAS
        mean_grad_T = beta1 * self.mean_grad_T + (1 - beta1) * grad_T
        mean_square_T = beta2 * self.mean_square_T + (1 - beta2) * grad_T.square()
        scale_T = (mean_square_T / (1 - beta2**updates)).sqrt() + self.EPS
        logit_T = self.logit_T - self.rate * mean_grad_T / (1 - beta1**updates) / scale_T
        for state, moved, when in (
            (self.logit_T, logit_T, follows),
            (self.mean_grad_T, mean_grad_T, follows),
            (self.mean_square_T, mean_square_T, follows),
            (self.updates, updates, follows),
            (self.loss_T, mean_T, usable),
        ):
            state.copy_(torch.where(when, moved, state))
