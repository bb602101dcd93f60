"""Custom ops of torch whose arguments are the fields of a NamedTuple.

The NamedTuple is the only place that states an op's signature: its schema is derived here, and the
implementations for CPU, for CUDA and for tracing (the fake one) all take one value of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.library import CustomOpDef

SCHEMA_TYPES = {
    Tensor: "Tensor",
    list[Tensor]: "Tensor[]",
    list[int]: "SymInt[]",
    list[float]: "float[]",
    list[bool]: "bool[]",
    float: "float",
    bool: "bool",
    str: "str",
}


def schema_of(arguments: type[tuple[Any, ...]], results: str) -> str:
    """Return the schema of an op that takes the fields of a NamedTuple and returns `results`."""
    fields = get_type_hints(arguments).items()
    return f"({', '.join(f'{SCHEMA_TYPES[kind]} {name}' for name, kind in fields)}) -> {results}"


def define(
    name: str,
    arguments: type[tuple[Any, ...]],
    results: str,
    *,
    cpu: Callable[[Any], Any],
    cuda: Callable[[Any], Any],
    fake: Callable[[Any], Any],
) -> CustomOpDef:
    """Register `unic_kernels::{name}`; every implementation takes one `arguments`, mutates none."""

    def unpacked(implementation: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda *given: implementation(arguments(*given))

    op = torch.library.custom_op(
        f"unic_kernels::{name}",
        unpacked(cpu),
        mutates_args=(),
        device_types="cpu",
        schema=schema_of(arguments, results),
    )
    op.register_kernel("cuda")(unpacked(cuda))
    op.register_fake(unpacked(fake))
    return op
