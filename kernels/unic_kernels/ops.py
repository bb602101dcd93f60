"""The method's costly parts, in both implementations that `--kernels` names.

`fused` is `unic_kernels`: few large GEMMs and one pass over the tokens, Triton on CUDA tensors, the
same algebra in torch on others. `reference` is what they mean in plain torch, to debug against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from unic_kernels import distill_loss, ladder, moments


class Ops(NamedTuple):
    """Functions of `unic_kernels`, which says what they take and give."""

    ladder_projection: Callable[..., Any]
    distill_loss: Callable[..., Any]
    drop_coefficients: Callable[..., Any]
    moments: Callable[..., Any]


FUSED = Ops(
    ladder.ladder_projection,
    distill_loss.distill_loss,
    distill_loss.drop_coefficients,
    moments.moments,
)
REFERENCE = Ops(
    ladder.ladder_projection_ref,
    distill_loss.distill_loss_ref,
    distill_loss.drop_coefficients_ref,
    moments.moments_ref,
)
KERNELS = {"fused": FUSED, "reference": REFERENCE}
