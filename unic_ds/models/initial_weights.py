"""Initial weights as a function of (seed, name)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unic_ds import rng


@torch.no_grad()
def initialise(weights: Mapping[str, Tensor], seed: int) -> None:
    """Give every weight its initial value, a function of (seed, name) on any rank and stage.

    Weights and position embeddings: normal of std 0.02, for which timm's truncation at -2 and 2 has
    no effect; CLS and register tokens: std 1e-6; biases 0; norms and layer scales keep the
    constants that they were built with. All are drawn on the CPU in fp32: under ZeRO-3 a weight is
    in bf16 on its GPU, whose generator draws other values. torch's trunc_normal_ is not used, since
    before 2.14 it draws other values, and in bf16 weights of -2 and 2.
    """
    for name, parameter in weights.items():
        if parameter.is_meta:
            continue
        generator = torch.Generator().manual_seed(rng.seed_for(seed, name))
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim > 1:
            std = 1e-6 if name.endswith(("cls_token", "reg_token")) else 0.02
            parameter.copy_(nn.init.normal_(on_cpu(parameter), std=std, generator=generator))


def on_cpu(x: Tensor) -> Tensor:
    """An empty fp32 tensor like `x` on the CPU, of its strides: they decide the order of draws."""
    return torch.empty_strided(x.shape, x.stride(), dtype=torch.float32, device="cpu")
