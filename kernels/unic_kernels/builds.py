"""Variants of kernels that ship, for `kernels/aot.py` to compile without a device.

`launch.py` of an op has `builds(arch)`, which yields every variant that it launches on an
architecture. Beside each kernel in `kernels.py` stand the types of its arguments, as Triton's own
compiler writes them: `*bf16:16` is a pointer to bf16 at a multiple of 16 bytes, `i32:16` an integer
that 16 divides, `i32` any integer. A type may be left open as `{dtype}`, for a build to fill in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

ArgumentTypes = Mapping[str, str]
"""Type -> names of the arguments that have it, with spaces between."""


class Build(NamedTuple):
    """One compilation of a kernel, as a launcher would ask for it on a device."""

    name: str
    kernel: Any
    types: Mapping[str, str]  # of every argument that is no constant
    constants: Mapping[str, Any]
    options: Mapping[str, int]


def build(
    name: str,
    kernel: Any,
    types: ArgumentTypes,
    constants: Mapping[str, Any],
    options: Mapping[str, int],
    **dtypes: str,
) -> Build:
    """Return a build, with `dtypes` in the types left open.

    AssertionError unless every argument of the kernel has one type or is one of `constants`.
    """
    typed = [(arg, kind.format(**dtypes)) for kind, args in types.items() for arg in args.split()]
    named = sorted([arg for arg, _ in typed] + list(constants))
    assert named == sorted(kernel.arg_names), (
        f"{name}: every argument needs one type or one constant; differing are"
        f" {sorted(set(named) ^ set(kernel.arg_names)) or 'those named twice'}"
    )
    return Build(name, kernel, dict(typed), constants, options)
