"""torch.compile for the blocks of a transformer, one by one: equal blocks share one compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

VARIANTS = 8
"""Compiled variants of one code object and number of tokens: torch's default, which an import of
timm.optim raises."""


def compile_each(blocks: nn.Module | list[nn.Module], *, varying: bool = False) -> None:
    """Compile each block's forward at its first call; hooks and later wrappers stay outside.

    `varying`: the number of images varies from call to call, and one variant serves all numbers
    but 1.
    """
    for block in blocks.children() if isinstance(blocks, nn.Module) else blocks:
        compiled = torch.compile(block.forward, dynamic=None if varying else False)
        block.forward = partial(with_any_images, compiled) if varying else compiled


def with_any_images(forward: Callable[..., Tensor], x: Tensor, *args: Any, **more: Any) -> Tensor:
    """Call a compiled forward whose code does not depend on the number of images of `x`."""
    if len(x) > 1:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch._dynamo.mark_static(x, 1)  # else a second resolution would make tokens dynamic too
    return forward(x, *args, **more)


@contextmanager
def from_scratch(on: bool, *, sizes: int = 1) -> Iterator[None]:
    """Context manager that drops compiled code and forbids a fallback to eager, if `on`.

    Each of `sizes` numbers of tokens has variants of its own.

    Dynamo keeps compiled code by code object, which models of one class share over all stages of a
    run. After the last variant (`recompile_limit`) it warns and runs eagerly; here RuntimeError
    with the remedy.
    """
    if not on:
        yield
        return
    import torch._dynamo  # seconds

    torch._dynamo.reset()
    limit = sizes * VARIANTS
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=limit):
        try:
            yield
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                f"torch.compile needs more than {limit} variants of a block (TORCH_LOGS="
                "recompiles names them), and the others would run uncompiled; start the same"
                " command with --run.compile none, student or teachers"
            ) from error


@contextmanager
def uncompiled(on: bool) -> Iterator[None]:
    """Context manager that runs compiled blocks eagerly, if `on`: for batches of other shapes."""
    if not on:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def equal_blocks(blocks: Iterable[nn.Module], *, of: nn.Module) -> list[nn.Module]:
    """The largest group of blocks that differ only in their weights, and hold most of a model's.

    Empty if there is no such group. `blocks` are modules of the model `of`.
    """
    groups: dict[object, list[nn.Module]] = {}
    for block in blocks:
        shapes = tuple((name, p.shape) for name, p in block.named_parameters())
        groups.setdefault((type(block), shapes), []).append(block)
    largest = max(groups.values(), key=num_weights, default=[])
    return largest if len(largest) > 1 and 2 * num_weights(largest) > num_weights([of]) else []


def num_weights(modules: Iterable[nn.Module]) -> int:
    """Number of weights of some modules."""
    return sum(p.numel() for module in modules for p in module.parameters())
