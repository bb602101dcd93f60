"""GELU and its derivative for the epilogues of Triton kernels.

gelu(z) = z Phi(z), gelu'(z) = Phi(z) + z phi(z), Phi(z) = (1 + erf(z / sqrt 2)) / 2. erf by
Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error| <= 1.5e-7. libdevice's
erf is more exact, but spills at large tiles and does not run in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def erf(x):
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * a)
    series = ((((1.061405429 * t - 1.453152027) * t) + 1.421413741) * t - 0.284496736) * t
    y = 1.0 - (series + 0.254829592) * t * tl.exp(-a * a)
    return tl.where(x < 0, -y, y)


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + erf(z * 0.7071067811865476))


@triton.jit
def gelu_derivative(z):
    """Derivative of `gelu`."""
    normal = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return 0.5 * (1.0 + erf(z * 0.7071067811865476)) + z * normal
