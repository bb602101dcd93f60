"""Teacher dropping in one launch: coefficients of the losses per teacher and image.

With B images, T teachers, their weights w, losses (T, B) and uniforms (T, B), of probability p:

    keep_tb = uniform_tb >= p, or t has the largest loss on image b (unit `image`),
              or on the mean over images (unit `step`)
    coefficient_tb = w_t keep_tb / divisor
    divisor = B (1 + (T - 1)(1 - p))  the number of kept pairs to expect (`expected`);
              B T (1 - p) if the hardest may go as well
            = the number of kept pairs, at least 1 (`kept`)

Sariyildiz et al., UNIC, arXiv 2408.05088, section 3.3. The first teacher wins a tie, and a loss
that is not a number is the largest, as in torch. Coefficients have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unic_kernels import custom_op
from unic_kernels.drop_coefficients import launch
from unic_kernels.drop_coefficients.arguments import Arguments, Divisor, Unit
from unic_kernels.drop_coefficients.ref import drop_coefficients_ref


def drop_coefficients(
    loss_TB: Tensor,
    uniform_TB: Tensor,
    weight_T: Tensor,
    *,
    rate: float,
    keep_hardest: bool = True,
    unit: Unit = "image",
    divisor: Divisor = "expected",
) -> Tensor:
    """Return the coefficients [T, B] of teacher dropping; no gradient.

    With unit `step`, `uniform_TB` must be equal along an image's row already. ValueError if shapes
    do not fit, or no pair need be kept.
    """
    if loss_TB.dim() != 2 or not len(loss_TB) or uniform_TB.shape != loss_TB.shape:
        found = f"{tuple(loss_TB.shape)} and {tuple(uniform_TB.shape)}"
        raise ValueError(f"losses and uniforms must be of one shape (T, B), got {found}")
    if weight_T.shape != loss_TB.shape[:1]:
        raise ValueError(f"{len(loss_TB)} teachers want as many weights, got {weight_T.tolist()}")
    if not 0 <= rate <= 1 or (rate == 1 and not keep_hardest):
        raise ValueError(f"rate must be in [0, 1], and < 1 without keep_hardest, got {rate}")
    choices = [keep_hardest, unit == "step", divisor == "kept"]
    weight_TB: Tensor = FORWARD(*Arguments(loss_TB.detach(), uniform_TB, weight_T, rate, choices))
    return weight_TB


def on_cpu(given: Arguments) -> Tensor:
    """Return the coefficients by plain torch: few numbers, for which a CPU needs no other way."""
    return drop_coefficients_ref(
        given.loss_TB,
        given.uniform_TB,
        given.weight_T,
        rate=given.rate,
        keep_hardest=given.keep_hardest,
        unit="step" if given.per_step else "image",
        divisor="kept" if given.count_kept else "expected",
    )


def fake(given: Arguments) -> Tensor:
    """Return an empty tensor of the shape that the op returns."""
    return torch.empty_like(given.loss_TB, memory_format=torch.contiguous_format)


FORWARD = custom_op.define(
    "drop_coefficients",
    Arguments,
    "Tensor",
    cpu=on_cpu,
    cuda=launch.drop_coefficients,
    fake=fake,
)
