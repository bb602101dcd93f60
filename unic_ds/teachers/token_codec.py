"""Tokens as the bytes of a feature cache, bf16 or scaled int8, and back."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds.tokens import Tokens


def encode(x_BNC: Tensor, dtype: str) -> list[NDArray[Any]]:
    """Blocks of a file: the tokens, if int8 after their scales."""
    if dtype == "bf16":
        return [x_BNC.bfloat16().contiguous().view(torch.int16).numpy()]
    x_BNC = x_BNC.float()
    parts = (x_BNC[:, :1], x_BNC[:, 1:])
    scale_2C = torch.stack([part.abs().amax((0, 1)) for part in parts]) / 127
    # A channel of zeros has no scale; one that is not finite stays so, and the step is skipped.
    scale_2C = torch.where(scale_2C == 0, 1.0, scale_2C)
    whole = [part / scale_C for part, scale_C in zip(parts, scale_2C, strict=True)]
    return [scale_2C.numpy(), torch.cat(whole, 1).round().to(torch.int8).numpy()]


def decode(scale_B2C: Tensor, x_BNC: Tensor, tokens: Tokens) -> None:
    """Write int8 tokens, CLS first, times their scales to `tokens`, a sample at a time."""
    for scale_2C, x_NC, cls_C, patch_NC in zip(scale_B2C, x_BNC, *tokens, strict=True):
        x_NC = x_NC.float()
        cls_C.copy_(x_NC[0] * scale_2C[0])
        patch_NC.copy_(x_NC[1:] * scale_2C[1])
