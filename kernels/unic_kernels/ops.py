"""The ops that the method is made of, in both implementations that `--kernels` names.

`fused` is few large GEMMs and one pass over the tokens: Triton for CUDA tensors, the same algebra
in torch for others. `reference` is what they mean in plain torch, to debug against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from unic_kernels.distill_loss.op import distill_loss
from unic_kernels.distill_loss.ref import Balance, Distilled, Refine, distill_loss_ref
from unic_kernels.drop_coefficients.arguments import Divisor, Unit
from unic_kernels.drop_coefficients.op import drop_coefficients
from unic_kernels.drop_coefficients.ref import drop_coefficients_ref
from unic_kernels.image_losses.arguments import Distance, Pair
from unic_kernels.ladder.op import ladder_projection
from unic_kernels.ladder.ref import ladder_projection_ref
from unic_kernels.moments.op import moments
from unic_kernels.moments.ref import moments_ref


class LadderProjection(Protocol):
    """Predictions [B, N, C_t] per teacher from the tokens of every rung; see `ladder/op.py`."""

    def __call__(
        self,
        x: Sequence[Tensor],
        w1: Sequence[Tensor],
        b1: Sequence[Tensor],
        w2: Sequence[Tensor],
        b2: Sequence[Tensor],
        layout: Sequence[Sequence[int]],
        *,
        recompute: str = "none",
    ) -> list[Tensor]: ...


class DistillLoss(Protocol):
    """The loss of a micro batch and its parts; see `distill_loss/op.py`."""

    def __call__(
        self,
        pred: Sequence[Pair],
        target: Sequence[Pair],
        mean: Sequence[Tensor],
        std: Sequence[Tensor],
        uniform_TB: Tensor,
        *,
        distances: Sequence[Distance],
        balance: Balance,
        refine: Refine | None = None,
        clamp: float = 0.0,
        eps: float = 1e-6,
    ) -> Distilled: ...


class DropCoefficients(Protocol):
    """Coefficients [T, B] of teacher dropping; see `drop_coefficients/op.py`."""

    def __call__(
        self,
        loss_TB: Tensor,
        uniform_TB: Tensor,
        weight_T: Tensor,
        *,
        rate: float,
        keep_hardest: bool = True,
        unit: Unit = "image",
        divisor: Divisor = "expected",
    ) -> Tensor: ...


class Moments(Protocol):
    """Count, mean and M2 per channel, fp64 [3, C]; see `moments/op.py`."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Ops(NamedTuple):
    """One implementation of every op."""

    ladder_projection: LadderProjection
    distill_loss: DistillLoss
    drop_coefficients: DropCoefficients
    moments: Moments


FUSED = Ops(ladder_projection, distill_loss, drop_coefficients, moments)
REFERENCE = Ops(ladder_projection_ref, distill_loss_ref, drop_coefficients_ref, moments_ref)
KERNELS = {"fused": FUSED, "reference": REFERENCE}
