"""fp32 matrix products on a CPU by oneDNN, which also has AVX-512 kernels for AMD.

torch's `@` calls MKL, whose kernels for AMD are AVX2: half as fast on a CPU with AVX-512.
"""

from __future__ import annotations

import torch
from torch import Tensor

HAS_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
USES_ONEDNN = torch.backends.mkldnn.is_available() and HAS_AVX512
"""Without AVX-512 it is no faster, and equal rows of different blocks may differ in a bit."""
CPU_BLOCK = 2**22
"""Numbers of a product on a CPU: 16 MB stay in its cache, and in memory that malloc has mapped."""


def product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias`, without a gradient. `b` may be a transposed view; `a` is copied if it is.

    oneDNN generates code for a new shape in about a millisecond.
    """
    is_fp32 = all(x.dtype == torch.float32 for x in (a_MK, b_NK, bias_N) if x is not None)
    if USES_ONEDNN and a_MK.device.type == "cpu" and is_fp32 and a_MK.shape[1]:
        # The op into which torch.compile turns a Linear on a CPU. It ignores a bias's strides.
        bias_N = None if bias_N is None else bias_N.contiguous()
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")
    return a_MK @ b_NK.T if bias_N is None else torch.addmm(bias_N, a_MK, b_NK.T)


def block_on(device: torch.device, most: int) -> int:
    """Numbers of a product that is computed at once on a device, at most so many."""
    return min(most, CPU_BLOCK) if device.type == "cpu" else most
