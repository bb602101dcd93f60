"""torch.compile for the blocks of a transformer, one by one: they share what is compiled once."""

from __future__ import annotations

import torch
from torch import nn


def compile_each(blocks: nn.Module | list[nn.Module]) -> None:
    """Compile each block's forward at its first call; hooks and later wrapping stay outside."""
    for block in blocks.children() if isinstance(blocks, nn.Module) else blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def repeated(module: nn.Module) -> list[nn.Module]:
    """The row of equal blocks that most of a model's weights are in; none where there is none."""
    whole = size(module)
    rows = [
        list(part.children())
        for part in module.modules()
        if isinstance(part, nn.Sequential | nn.ModuleList)
    ]
    own = (row for row in rows if len(row) > 1 and alike(row) and 2 * sum(map(size, row)) > whole)
    return next(own, [])


def size(module: nn.Module) -> int:
    """How many weights a module has."""
    return sum(p.numel() for p in module.parameters())


def alike(blocks: list[nn.Module]) -> bool:
    """Whether blocks are of one class with parameters of the same names and shapes."""
    kinds = {
        (type(block), *((name, p.shape) for name, p in block.named_parameters()))
        for block in blocks
    }
    return len(kinds) == 1 and len(kinds.pop()) > 1
