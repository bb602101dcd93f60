"""Teacher dropping, plain and lazy (Sariyildiz et al., UNIC, arXiv 2408.05088, section 3.3)."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import config
from unic_ds.losses.balancer import Balancer, teacher_weights
from unic_ds.losses.loss_balancers import RunningLosses
from unic_kernels.drop_coefficients.arguments import expected_pairs
from unic_kernels.ops import FUSED, KERNELS, Divisor, Ops


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
