"""Balancers weigh the teachers of each image: losses (T, B) in, coefficients (T, B) out.

The loss of a pair that is not computed is -inf; its coefficient is set to 0 afterwards.
A micro batch's loss is the sum of loss x coefficient; it is averaged over ranks and accumulation.
Coefficients carry no gradient. With B images, T teachers and their weights w (mean 1):

    none      1 / (B T)
    fixed     w_t / (B T)
    dropping  w_t keep_tb / (B (1 + (T - 1)(1 - p))): an image's hardest teacher is kept, others are
              dropped with probability p (Sariyildiz et al., UNIC, arXiv 2408.05088, section 3.3)
              drop.lazy: the hardest is the teacher with the largest running loss, so that the pairs
              are drawn before the teachers run (after DiverseDistill, arXiv 2402.14035)
    adaloss   w_t a_t / (B T), a_t ~ 1 / running loss, mean 1 (Hu et al., arXiv 1708.06832; tried
              on several teachers by AM-RADIO, arXiv 2312.06709)

To add one, give its class a name in `BALANCERS`: that name is a value of `--balance.kind`.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unic_ds import config, dist
from unic_kernels.drop_coefficients.arguments import expected_pairs
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
        """Coefficients (T, B) of a micro batch's losses; `uniform_TB` is noise in [0, 1).

        It is -1 for pairs that are not seen, whose losses are -inf.
        """
        return self.weight_T[:, None] * self.share(loss_TB.detach(), uniform_TB)

    def share(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        """Coefficients before the teachers' weights."""
        return torch.full_like(loss_TB, 1 / loss_TB.numel())

    def choose_pairs(self, step: int, uniform_TB: NDArray[np.float64]) -> NDArray[np.bool_] | None:
        """Pairs of a micro batch that `step` computes, chosen before the teachers run.

        `uniform_TB` is negative for pairs that are not seen, which may not be chosen. None: all
        others. Else `forward` gets the pairs, as 1 and 0, in place of the uniforms.
        """
        return None

    def metrics(self, loss_TB: Tensor) -> dict[str, Tensor]:
        """Logged values of a micro batch's losses [T, B], in each step under the same names."""
        return {}

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


class RunningLosses(Balancer):
    """Base class of balancers by each teacher's running loss over the global batch."""

    running_T: Tensor
    sums_2T: Tensor

    def __init__(self, weight_T: Tensor, momentum: float):
        super().__init__(weight_T)
        self.momentum = momentum
        self.register_buffer("running_T", torch.zeros_like(weight_T))  # 0: before the first step
        # Loss and images since the last `track`; empty at every checkpoint.
        sums_2T = torch.zeros(2, len(weight_T), dtype=torch.float64)
        self.register_buffer("sums_2T", sums_2T, persistent=False)

    def observe(self, loss_TB: Tensor) -> None:
        """Add a micro batch's losses, of pairs that are computed."""
        counted_TB = loss_TB != -torch.inf
        sums_2TB = torch.stack([torch.where(counted_TB, loss_TB, 0.0), counted_TB.to(loss_TB)])
        self.sums_2T += sums_2TB.double().sum(2)

    @torch.no_grad()
    def track(self, taken: Tensor | None = None) -> None:
        loss_T, images_T = dist.all_gather(self.sums_2T).sum(0)
        mean_T = (loss_T / images_T.clamp(min=1)).float()
        moved_T = self.momentum * self.running_T + (1 - self.momentum) * mean_T
        moved_T = torch.where(self.running_T > 0, moved_T, mean_T)
        moved_T = torch.where(images_T > 0, moved_T, self.running_T)
        # A skipped step whose loss is not finite must not change the weights either.
        usable = moved_T.isfinite().all()
        usable = usable if taken is None else usable & taken
        self.running_T.copy_(torch.where(usable, moved_T, self.running_T))
        self.sums_2T.zero_()


class AdaLoss(RunningLosses):
    """Weights by the inverse of each teacher's running loss."""

    @classmethod
    def from_config(cls, cfg: config.Config) -> Self:
        return cls(teacher_weights(cfg), cfg.balance.momentum)

    def share(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        self.observe(loss_TB)
        inverse_T = torch.where(self.running_T > 0, 1 / self.running_T, 1.0)
        share_T = inverse_T / inverse_T.mean()
        return (share_T / loss_TB.numel())[:, None].expand_as(loss_TB)


class LazyDropping(RunningLosses):
    """Teacher dropping whose pairs are chosen before the teachers run.

    Of the teachers that see an image, the one with the largest running loss is kept, others as in
    `Dropping`. The first step, and one of every `drop.full_every`, is full: all pairs are computed,
    dropping is that of `Dropping`, and the running losses at its end judge the teachers until the
    next one, for which the host reads them. They move by the mean over a teacher's computed images,
    which is unbiased: the choice does not depend on the losses of these.
    """

    judged_T: Tensor

    def __init__(self, weight_T: Tensor, full: Dropping, momentum: float):
        """`full` is the dropping of full steps."""
        super().__init__(weight_T, momentum)
        self.full = full
        self.register_buffer("judged_T", torch.zeros_like(weight_T))  # 0: not known yet
        self.is_full = True  # the step that is being taken
        self.judged_on_host: NDArray[np.float32] | None = None  # None: not read yet
        self.register_load_state_dict_post_hook(lambda *_: self.forget())

    @classmethod
    def from_config(cls, cfg: config.Config) -> Self:
        return cls(teacher_weights(cfg), Dropping.from_config(cfg), cfg.balance.momentum)

    def forget(self) -> None:
        """Read the judged losses from the device when they are needed next."""
        self.judged_on_host = None

    def choose_pairs(self, step: int, uniform_TB: NDArray[np.float64]) -> NDArray[np.bool_] | None:
        if self.judged_on_host is None:
            self.judged_on_host = np.array(self.judged_T.tolist(), dtype=np.float32)
        drop, judged_T = self.full.drop, self.judged_on_host
        self.is_full = not judged_T.any() or step % drop.full_every == 0
        if self.is_full:
            return None
        seen_TB = uniform_TB >= 0
        kept_TB = seen_TB & (uniform_TB >= drop.rate)
        if drop.keep_hardest:
            hardest_B = np.where(seen_TB, judged_T[:, None], -1).argmax(0)
            kept_TB[hardest_B, np.arange(len(hardest_B))] = True
        return kept_TB & seen_TB

    @torch.no_grad()
    def forward(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        """Coefficients (T, B); in a step that is not full `uniform_TB` is 1 for kept pairs."""
        self.observe(loss_TB)
        if self.is_full:
            return self.full(loss_TB, uniform_TB)
        kept_TB, drop = uniform_TB, self.full.drop
        pairs = expected_pairs(loss_TB, drop.rate, drop.keep_hardest)
        divisor = kept_TB.sum().clamp(min=1) if self.full.divisor == "kept" else pairs
        return self.full.weight_T[:, None] * kept_TB / divisor

    def metrics(self, loss_TB: Tensor) -> dict[str, Tensor]:
        """Share of images whose hardest teacher is another than the judged one; else NaN.

        It is known in full steps, from the second on.
        """
        if not self.is_full:
            return {"hardest_other": torch.full_like(loss_TB[0, 0], torch.nan)}
        judged_TB = torch.where(loss_TB == -torch.inf, -torch.inf, self.judged_T[:, None])
        other_B = (loss_TB.argmax(0) != judged_TB.argmax(0)).float()
        known = self.judged_T.any()
        return {"hardest_other": torch.where(known, other_B.mean(), torch.nan)}

    @torch.no_grad()
    def track(self, taken: Tensor | None = None) -> None:
        super().track(taken)
        if self.is_full:
            judged_T = (
                self.running_T if taken is None else self.running_T.where(taken, self.judged_T)
            )
            self.judged_T.copy_(judged_T)
            self.forget()


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
    kind = LazyDropping if cfg.drop.lazy else BALANCERS[cfg.balance.kind]
    return kind.from_config(cfg)
