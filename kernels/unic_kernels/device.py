"""What every op shares on its way to a device: configs by architecture, builds to check ahead.

An op file offers `builds(arch)`: every variant of its kernels that it ships for an architecture.
`kernels/aot.py` compiles them all without a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

ARCHS = (80, 90, 100)
"""Compute capabilities (Ampere, Hopper, Blackwell) that have configs of their own."""

Config = TypeVar("Config")


class Build(NamedTuple):
    """One compilation of a kernel, as the launcher would ask for it on a device.

    `types` has an entry per argument that is no constant, in the kernel's order; pointers and the
    integers in `aligned` are multiples of 16, as they are for every width in use.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    aligned: frozenset[str] = frozenset()


def pick(configs: Mapping[int, Config], device: torch.device) -> Config:
    """The config of the newest architecture that `device` runs; Hopper's in the interpreter."""
    if device.type != "cuda":
        return configs[90]
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in configs if arch <= 10 * major + minor]
    if not known:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor};"
            f" the kernels need {min(configs) / 10} or newer, so run with --kernels reference"
        )
    return configs[max(known)]


def beside(x: Tensor) -> AbstractContextManager:
    """Launch on the device that holds `x`, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dense(x: Tensor) -> Tensor:
    """`x` where its last axis is contiguous, as kernels read it, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 where it has that."""
    return x if x.dtype == torch.float64 else x.float()
