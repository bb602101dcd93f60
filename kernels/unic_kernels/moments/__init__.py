"""Count, mean and M2 per channel; `op.py` has the maths and the public function."""

from unic_kernels.moments.op import moments
from unic_kernels.moments.ref import moments_ref

__all__ = ["moments", "moments_ref"]
