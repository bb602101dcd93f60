"""Collectives over all ranks; with one rank each is the identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as td
from torch import Tensor

from unic_ds.dist.ranks import local_rank, rank, world

T = TypeVar("T")

# torch 2.14 renamed it, and warns about the old name.
all_gather_single = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor


def barrier() -> None:
    """Wait for all ranks."""
    if td.is_initialized() and world() > 1:
        td.barrier()


@contextmanager
def local_main_first() -> Iterator[None]:
    """Context manager whose body each node's first rank runs before the others.

    The first one reads from the disk, the others from the page cache.
    """
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def all_gather(values: Tensor) -> Tensor:
    """`values` of every rank, stacked on a new first axis in rank order; the same on all ranks."""
    if world() == 1:
        return values[None]
    found = values.new_empty(world(), *values.shape)
    all_gather_single(found.view(-1), values.contiguous().view(-1))
    return found


def all_gather_batch(values_BC: Tensor) -> tuple[Tensor, int]:
    """(rows of every rank in rank order, offset of this rank's); each rank has equally many."""
    return all_gather(values_BC).flatten(0, 1), rank() * len(values_BC)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum of `values` over the ranks; the same on all."""
    if world() == 1:
        return values
    summed = values.clone()
    td.all_reduce(summed)
    return summed


def all_reduce_in_background(values: Tensor) -> td.Work | None:
    """Start to sum `values` over the ranks, in place; wait for the result, None with one rank."""
    return td.all_reduce(values, async_op=True) if world() > 1 else None


def gather_to_rank(values: Tensor, owner: int) -> Tensor | None:
    """`values` of every rank, stacked on a new first axis, on rank `owner`; None on the others."""
    if world() == 1:
        return values[None]
    values = values.contiguous()
    found = values.new_empty(world(), *values.shape) if rank() == owner else None
    td.gather(values, None if found is None else list(found), dst=owner)
    return found


def all_gather_objects(value: T) -> list[T]:
    """`value` of every rank in rank order; for small objects off the hot path."""
    if world() == 1:
        return [value]
    values: list[T | None] = [None] * world()
    td.all_gather_object(values, value)
    return cast(list[T], values)


def broadcast_object(value: T) -> T:
    """`value` of rank 0, on every rank."""
    if world() == 1:
        return value
    values = [value]
    td.broadcast_object_list(values, src=0)
    return values[0]


def on_rank_0(find: Callable[[], T]) -> T:
    """Result of `find` on rank 0, returned on every rank.

    Its ValueError is raised on all; any other exception on rank 0, and RuntimeError on the others.
    """
    found, failure = None, None
    try:
        found = find() if rank() == 0 else None
    except Exception as error:
        failure = error
    refused, problem = isinstance(failure, ValueError), f"{failure}"
    found, failed, refused, problem = broadcast_object((found, bool(failure), refused, problem))
    if refused:
        raise ValueError(problem) from failure
    if failure:
        raise failure
    if failed:
        raise RuntimeError(f"rank 0 failed: {problem}")
    return cast(T, found)
