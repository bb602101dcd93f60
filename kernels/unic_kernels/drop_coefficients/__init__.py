"""Teacher dropping; `op.py` has the maths and the public function."""

from unic_kernels.drop_coefficients.op import drop_coefficients
from unic_kernels.drop_coefficients.ref import drop_coefficients_ref

__all__ = ["drop_coefficients", "drop_coefficients_ref"]
