"""Teachers of eight bits: quantisation by torchao, and agreement of their tokens with bf16.

Only the Linears of a tower's blocks are: nearly all of its weights and its work. int8 and fp8 store
weights with a scale for each output, and compute in bf16; *_dynamic quantise their inputs
too, with a scale for each token, which a GPU's eight-bit units need to be faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as Uncalled

from unic_ds import config
from unic_ds.tokens import Tokens

LEAST = 0.998
"""Mean cosine to bf16, of each kind of token, below which a quantised teacher is refused."""
FP8_CAPABILITY = (8, 9)
Sample = Callable[[int], Tensor]
"""A few real images of a side in pixels, uint8 [B, 3, side, side]."""


def check_device(row: config.Teacher, device: torch.device) -> None:
    """ValueError if a device has no units for a teacher's precision."""
    if row.precision != "fp8_dynamic" or device.type == "meta":
        return
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if found < FP8_CAPABILITY:
        what = f"a GPU of {found[0]}.{found[1]}" if device.type == "cuda" else "a CPU"
        raise ValueError(
            f"--teachers.{row.name}.precision fp8_dynamic needs a GPU of compute capability 8.9 or"
            f" above, this is {what}; take fp8 (weights alone), int8 or bf16"
        )


def linears(blocks: list[nn.Module]) -> list[nn.Linear]:
    """Linears to quantise: all but those that MultiheadAttention computes without calling them."""
    parts = (part for block in blocks for part in block.modules())
    return [p for p in parts if isinstance(p, nn.Linear) and not isinstance(p, Uncalled)]


def nbytes(blocks: list[nn.Module]) -> tuple[int, int]:
    """(bytes of the quantised weights with their scales, weights of the largest)."""
    weights = [linear.weight for linear in linears(blocks)]
    scales = sum(len(weight) * torch.float32.itemsize for weight in weights)
    sizes = [weight.numel() for weight in weights]
    return sum(sizes) + scales, max(sizes, default=0)


def check_tower(row: config.Teacher, blocks: list[nn.Module]) -> None:
    """ValueError if there is nothing to quantise."""
    if not linears(blocks):
        raise ValueError(
            f"--teachers.{row.name}.precision must be bf16 or fp32, got {row.precision!r}: the"
            " blocks of this tower have no Linears to quantise"
        )


def quantise(row: config.Teacher, tower: nn.Module, blocks: list[nn.Module]) -> None:
    """Quantise a tower in place."""
    # Optional: no other teacher needs it.
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    how: dict[str, Callable[[], Any]] = {
        "int8": Int8WeightOnlyConfig,
        "fp8": Float8WeightOnlyConfig,
        "int8_dynamic": Int8DynamicActivationInt8WeightConfig,
        "fp8_dynamic": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }
    chosen = {id(linear) for linear in linears(blocks)}
    quantize_(tower, how[row.precision](), filter_fn=lambda part, _: id(part) in chosen)


def agreement(ours: Tokens, exact: Tokens) -> dict[str, float]:
    """Cosines of tokens to exact ones: mean and worst of each kind."""
    found: dict[str, float] = {}
    for kind, x, y in zip(("cls", "patch"), ours, exact, strict=True):
        cosine = torch.cosine_similarity(x.float(), y.float(), dim=-1)
        found |= {kind: round(cosine.mean().item(), 5), f"{kind}_worst": cosine.min().item()}
    return {name: round(value, 5) for name, value in found.items()}


def check_agreement(name: str, precision: str, found: dict[str, float]) -> None:
    """RuntimeError if a quantised teacher's tokens differ too much from its bf16 tokens."""
    for kind in ("cls", "patch"):
        if kind in found and not found[kind] >= LEAST:
            raise RuntimeError(
                f"teacher {name!r} in {precision} is not what it was: the mean cosine of its {kind}"
                f" tokens to those in bf16 is {found[kind]:.4f}, below {LEAST}; set"
                f" --teachers.{name}.precision bf16"
            )
