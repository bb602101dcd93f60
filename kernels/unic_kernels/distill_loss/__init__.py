"""The distillation loss; `op.py` has the maths and the public function."""

from unic_kernels.distill_loss.op import distill_loss
from unic_kernels.distill_loss.ref import Distilled, distill_loss_ref

__all__ = ["Distilled", "distill_loss", "distill_loss_ref"]
