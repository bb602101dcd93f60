"""Exports in int8, and the agreement of outputs in another precision with those in fp32."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from unic_ds.weights.formats.handover import Outputs, Precision

SPLIT = "_MatMul"
"""End of the name that onnxruntime gives a Gemm's product before it quantises."""
LEAST = 0.9
"""Mean cosine to fp32 below which another precision is refused."""


def optional(name: str) -> ModuleType:
    """A module of a package that no other export needs."""
    return import_module(name)


def quantise_onnx(plain: Path, out: Path, *, kept: Sequence[str], external: bool) -> None:
    """Write an ONNX graph with int8 weights; activations are quantised as they come.

    Nodes of the names `kept` stay in fp32.
    """
    quantization = optional("onnxruntime.quantization")
    logging.disable(logging.WARNING)  # it recommends a step for convolutions
    try:
        quantization.quantize_dynamic(
            plain,
            out,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=[*kept, *(f"{name}{SPLIT}" for name in kept)],
            use_external_data_format=external,
        )
    finally:
        logging.disable(logging.NOTSET)


def quantise_linears(module: nn.Module) -> None:
    """Quantise the weights of all Linears in place by torchao: int8, a scale for each output."""
    quantization = optional("torchao.quantization")
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    optional("torchao.utils").unwrap_tensor_subclass(module)


def cosines(
    exact: Sequence[Outputs], found: Sequence[Outputs], quantise: Precision
) -> dict[str, float]:
    """Mean cosine of each output to the exact one; RuntimeError if one is below `LEAST`."""
    means = {}
    for name in exact[0]:
        pairs = [(x[name].float(), y[name].float()) for x, y in zip(exact, found, strict=True)]
        parts = [torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs]
        means[name] = torch.cat(parts).mean().item()
        if not means[name] >= LEAST:
            raise RuntimeError(
                f"in {quantise} the export's {name} is not what it was: its mean cosine to fp32 is"
                f" {means[name]:.4f}, below {LEAST}; export without --quantize"
            )
    return means
