"""Deterministic kernels, with which a run on a GPU is reproducible bit for bit.

A CPU's kernels are deterministic anyway. On a GPU torch chooses, among others, cuDNN's attention,
whose backward adds in an order that differs from one run to the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

from unic_ds.files.printable import printable

REFUSED = " does not have a deterministic implementation"
"""Follows the name of an operation in torch's message about refusing it."""
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = ":4096:8", ":16:8"
"""Values of the variable with which cuBLAS is deterministic."""


def choose(on: bool) -> None:
    """Let torch use deterministic kernels only, or any; call it before CUDA and the ranks start.

    Flash and memory-efficient attention have a deterministic backward in this mode, cuDNN's has
    none. If the mode is on when a process group is made, torch disables NCCL's reductions in the
    switch (NVLS). ValueError if the environment sets cuBLAS to another mode.
    """
    if on == torch.are_deterministic_algorithms_enabled():
        return
    if on:
        if (value := os.environ.setdefault(WORKSPACE, FIXED[0])) not in FIXED:
            raise ValueError(
                f"{WORKSPACE} is {printable(repr(value))}, with which cuBLAS is not deterministic;"
                f" unset it, or set it to {FIXED[0]}, or leave out --run.deterministic"
            )
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(on)
    # Every tensor that it would fill is written later. The module's types lack this property.
    torch.utils.deterministic.fill_uninitialized_memory = not on  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(not on)


@contextmanager
def explained() -> Iterator[None]:
    """Context manager: an operation without a deterministic kernel is an error with a remedy."""
    try:
        yield
    except RuntimeError as error:
        name, found, _ = str(error).partition(REFUSED)
        if not found:
            raise
        raise RuntimeError(
            f"{printable(name)} has no deterministic kernel on this device, and run.deterministic"
            " allows no other; start the same command with --run.deterministic false"
        ) from error
