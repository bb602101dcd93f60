"""Count, mean and M2 per channel: `op.py` has the maths and the public function."""

from unic_kernels.moments.op import moments, moments_ref

__all__ = ["moments", "moments_ref"]
