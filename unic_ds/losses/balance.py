"""Balancers weigh the teachers of each image: losses (T, B) in, coefficients (T, B) out.

A micro batch's loss is the sum of loss x coefficient; it is averaged over ranks and accumulation.
Coefficients carry no gradient. With B images, T teachers and their weights w (mean 1):

    none      1 / (B T)
    fixed     w_t / (B T)
    dropping  w_t keep_tb / (B (1 + (T - 1)(1 - p))): an image's hardest teacher is kept, others are
              dropped with probability p (Sariyildiz et al., UNIC, arXiv 2408.05088, section 3.3)
    adaloss   w_t a_t / (B T), a_t ~ 1 / running loss, mean 1 (Hu et al., arXiv 1708.06832; tried
              on several teachers by AM-RADIO, arXiv 2312.06709)

To add one, give its class a name in `BALANCERS`: that name is a value of `--balance.kind`.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from unic_ds import config, dist
from unic_kernels.ops import FUSED, KERNELS, Divisor, Ops


class Balancer(nn.Module):
    """Balancer with constant weights (`none`, `fixed`); base class of the others.

    A subclass overrides `share` (or `forward`), `track` if it learns from the losses, and
    `from_config` if its constructor takes more than the weights. Its buffers are checkpointed.
    """

    weight_T: Tensor

    def __init__(self, weight_T: Tensor):
        super().__init__()
        self.register_buffer("weight_T", weight_T / weight_T.mean(), persistent=False)

    @classmethod
    def from_config(cls, cfg: config.Config) -> Self:
        """Balancer of a run's teachers."""
        return cls(teacher_weights(cfg))

    @torch.no_grad()
    def forward(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        """Coefficients (T, B) of a micro batch's losses; `uniform_TB` is noise in [0, 1)."""
        return self.weight_T[:, None] * self.share(loss_TB.detach(), uniform_TB)

    def share(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        """Coefficients before the teachers' weights."""
        return torch.full_like(loss_TB, 1 / loss_TB.numel())

    def track(self, taken: Tensor | None = None) -> None:
        """Update running state at the end of an optimiser step, unless `taken` is false.

        Every rank calls it.
        """


class Dropping(Balancer):
    """Teacher dropping, by image or by step.

    `loss.divisor`: `expected` is B (1 + (T - 1)(1 - p)), linear in the images, so that the loss
    does not depend on ranks and accumulation; `kept` is the number of kept pairs, as in the
    authors' code, which depends on them.
    """

    def __init__(self, weight_T: Tensor, drop: config.Drop, divisor: Divisor, ops: Ops = FUSED):
        super().__init__(weight_T)
        self.drop, self.divisor, self.ops = drop, divisor, ops

    @classmethod
    def from_config(cls, cfg: config.Config) -> Self:
        return cls(teacher_weights(cfg), cfg.drop, cfg.loss.divisor, KERNELS[cfg.kernels])

    @torch.no_grad()
    def forward(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        return self.ops.drop_coefficients(
            loss_TB,
            uniform_TB,
            self.weight_T,
            rate=self.drop.rate,
            keep_hardest=self.drop.keep_hardest,
            unit=self.drop.unit,
            divisor=self.divisor,
        )


class AdaLoss(Balancer):
    """Weights by the inverse of each teacher's running loss over the global batch."""

    running_T: Tensor
    sums_2T: Tensor

    def __init__(self, weight_T: Tensor, momentum: float):
        super().__init__(weight_T)
        self.momentum = momentum
        self.register_buffer("running_T", torch.zeros_like(weight_T))  # 0: before the first step
        # Loss and images since the last `track`; empty at every checkpoint.
        sums_2T = torch.zeros(2, len(weight_T), dtype=torch.float64)
        self.register_buffer("sums_2T", sums_2T, persistent=False)

    @classmethod
    def from_config(cls, cfg: config.Config) -> Self:
        return cls(teacher_weights(cfg), cfg.balance.momentum)

    def share(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        sums_2TB = torch.stack([loss_TB, torch.ones_like(loss_TB)]).double()
        self.sums_2T += sums_2TB.sum(2)
        inverse_T = torch.where(self.running_T > 0, 1 / self.running_T, 1.0)
        share_T = inverse_T / inverse_T.mean()
        return (share_T / loss_TB.numel())[:, None].expand_as(loss_TB)

    @torch.no_grad()
    def track(self, taken: Tensor | None = None) -> None:
        loss_T, images_T = dist.all_gather(self.sums_2T).sum(0)
        mean_T = (loss_T / images_T.clamp(min=1)).float()
        moved_T = self.momentum * self.running_T + (1 - self.momentum) * mean_T
        moved_T = torch.where(self.running_T > 0, moved_T, mean_T)
        # A skipped step whose loss is not finite must not change the weights either.
        usable = moved_T.isfinite().all()
        usable = usable if taken is None else usable & taken
        self.running_T.copy_(torch.where(usable, moved_T, self.running_T))
        self.sums_2T.zero_()


BALANCERS: dict[str, type[Balancer]] = {
    "none": Balancer,
    "fixed": Balancer,
    "dropping": Dropping,
    "adaloss": AdaLoss,
}


def teacher_weights(cfg: config.Config) -> Tensor:
    """Weights [T] of a run's teachers, in config order."""
    return torch.tensor([row.weight for row in cfg.teachers])


def build(cfg: config.Config) -> Balancer:
    """The balancer of a run; its `state_dict` belongs in the checkpoint."""
    return BALANCERS[cfg.balance.kind].from_config(cfg)
