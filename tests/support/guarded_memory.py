"""Memory of a kernel's results: poisoned with NaN, and between guards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.overrides import TorchFunctionMode

GUARD, WIDTH = 12345.0, 64


class Guarded(TorchFunctionMode):
    """New tensors are NaN all over and lie between guards."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fresh = func(*args, **(kwargs or {}))
        if func not in (Tensor.new_empty, torch.empty_like) or not fresh.numel():
            return fresh
        assert fresh.is_contiguous()
        block = torch.full((fresh.numel() + 2 * WIDTH,), GUARD, dtype=fresh.dtype)
        block[WIDTH:-WIDTH] = torch.nan
        self.blocks.append(block)
        return block[WIDTH:-WIDTH].view(fresh.shape)


def use_triton(op: CustomOpDef, arguments: Callable[..., Any], launch: Callable[..., Any]) -> None:
    """Let CPU tensors take the launcher, which may write nothing outside of new tensors."""

    def guarded(*given: Any) -> Any:
        with Guarded() as mode:
            found = launch(arguments(*given))
        for block in mode.blocks:
            assert block[:WIDTH].eq(GUARD).all() and block[-WIDTH:].eq(GUARD).all()
        return found

    op.register_kernel("cpu")(guarded)
