"""Launching on the device that holds a tensor, with the config of its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

ARCHS = (80, 90, 100)
"""Compute capabilities (Ampere, Hopper, Blackwell) that have configs of their own."""

Config = TypeVar("Config")


def config_for(configs: Mapping[int, Config], device: torch.device) -> Config:
    """Return the config of the newest architecture that `device` runs.

    CPU tensors, which reach a launcher in Triton's interpreter alone, take Hopper's. ValueError for
    a GPU that is older than every config.
    """
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


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Context manager that makes the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def contiguous_rows(x: Tensor) -> Tensor:
    """Return `x` if its last axis is contiguous, as kernels read it, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
