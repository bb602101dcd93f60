"""torch.compile for the blocks of a transformer, one by one: they share what is compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

VARIANTS = 8
"""Compiled variants of one code object: torch's default, which importing timm.optim raises."""


def compile_each(blocks: nn.Module | list[nn.Module]) -> None:
    """Compile each block's forward at its first call; hooks and later wrapping stay outside."""
    for block in blocks.children() if isinstance(blocks, nn.Module) else blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


@contextmanager
def from_scratch(on: bool) -> Iterator[None]:
    """Context manager that forgets compiled code, then lets none fall back to eager; if `on`.

    Dynamo keeps what it compiles by code object, which models of one class share over all stages
    of a run, and runs eagerly what comes after the 8th (`recompile_limit`), with a warning alone.
    RuntimeError with the remedy instead.
    """
    if not on:
        yield
        return
    import torch._dynamo  # seconds
    from torch._dynamo.exc import FailOnRecompileLimitHit

    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=VARIANTS):
        try:
            yield
        except FailOnRecompileLimitHit as error:
            raise RuntimeError(
                f"torch.compile was asked for more than {VARIANTS} variants of a block (TORCH_LOGS="
                "recompiles names them), and the rest would run uncompiled; start the same command"
                " with --run.compile none, student or teachers"
            ) from error


@contextmanager
def uncompiled(on: bool) -> Iterator[None]:
    """Context manager that runs compiled blocks by their plain code, if `on`: of other batches."""
    if not on:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
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
