"""The distillation loss: `op.py` has the maths and the public functions."""

from unic_kernels.distill_loss.op import (
    Distilled,
    distill_loss,
    distill_loss_ref,
    drop_coefficients,
    drop_coefficients_ref,
)

__all__ = [
    "Distilled",
    "distill_loss",
    "distill_loss_ref",
    "drop_coefficients",
    "drop_coefficients_ref",
]
