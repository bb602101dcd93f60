"""Counters of operators on fake tensors: FLOPs, bytes moved, kernel launches, live memory."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Self

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

FREE = ("prim.", "empty", "_unsafe_view", "detach", "lift_fresh", "_local_scalar_dense")
"""Parts of the names of operators that launch no kernel, besides views."""


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that operators allocate: live now, and at most; not of `inputs`."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.collects = gc.isenabled()

    def __enter__(self) -> Self:
        # Garbage in reference cycles must not count, or a peak would depend on when the collector
        # runs. So it runs only when a peak grows, on objects made from here on.
        gc.disable()
        gc.freeze()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        gc.unfreeze()
        if self.collects:
            gc.enable()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        found = func(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, Tensor):
                self.track(value.untyped_storage())
        return found

    def track(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        weakref.finalize(storage, self.release, key, storage.nbytes())
        if self.now > 1.02 * self.peak:
            gc.collect()
        self.peak = max(self.peak, self.now)

    def release(self, key: int, nbytes: int) -> None:
        """Stop counting a storage that is freed."""
        self.known.discard(key)
        self.now -= nbytes


@dataclass(frozen=True)
class Work:
    """FLOPs by kind of kernel, bytes moved by all other kernels, and kernel launches; additive."""

    matmul: float = 0.0  # FLOPs of matrix products and convolutions
    attention: float = 0.0  # FLOPs
    ladder: float = 0.0  # FLOPs of the forward in the ladder's own kernels
    moved: float = 0.0  # bytes that all other operators read and write, one by one
    moved_fused: float = 0.0  # the same if operators between two products are fused
    launches: float = 0.0  # kernels
    launches_fused: float = 0.0

    @property
    def flops(self) -> float:
        """FLOPs of all kernels."""
        return self.matmul + self.attention + self.ladder

    def combine(self, function: Callable[..., float], *others: Work) -> Work:
        """Apply a function to each number."""
        return Work(*map(function, astuple(self), *map(astuple, others)))

    def times(self, factor: float) -> Work:
        """The work of `factor` times as many images."""
        return self.combine(lambda number: factor * number)

    def of_images(self, share: float) -> Work:
        """The work of the same kernels on a share of the images."""
        launches, fused = self.launches, self.launches_fused
        return replace(self.times(share), launches=launches, launches_fused=fused)

    def since(self, before: Work) -> Work:
        """The work that was added since `before`."""
        return self.combine(lambda now, then: now - then, before)


class Meter(LiveMemory):
    """Live memory, and the Work of operators.

    An operator reads its arguments and writes its results once. Bytes of products and attention
    are not counted: FLOPs decide their time. A row of fused operators reads the tensors that it
    does not make and writes those that outlive it; temporaries stay in registers.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__(inputs)
        self.formulas = flop_counter().flop_registry
        self.counted = dict.fromkeys(Work.__dataclass_fields__, 0.0)
        self.row_reads: dict[int, int] = {}
        self.row_makes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if launches(func):
            self.count(func, args, kwargs or {}, found)
        return found

    @property
    def flops(self) -> float:
        """FLOPs so far."""
        return sum(self.counted[kind] for kind in ("matmul", "attention", "ladder"))

    def work(self) -> Work:
        """The work so far; ends a row of fused operators."""
        self.end_row()
        return Work(**self.counted)

    def count(
        self,
        func: OpOverload,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        found: object,
    ) -> None:
        """Count an operator that launches kernels."""
        formula, kind = self.formulas.get(func._overloadpacket), kind_of(func)
        kernels = entries(args) if func.namespace == "unic_kernels" else 1
        self.counted["launches"] += kernels
        if formula or kind == "ladder":
            self.end_row()
            self.counted["launches_fused"] += kernels
            self.counted[kind] += formula(*args, **kwargs, out_val=found) if formula else 0
            return
        read = tensors((args[1:] if overwrites(func) else args, kwargs))
        for row, values in ((self.row_reads, read), (self.row_makes, tensors(found))):
            for x in values:
                storage, nbytes = x.untyped_storage(), distinct_bytes(x)
                key = storage._cdata
                self.counted["moved"] += nbytes
                if row is self.row_makes or key not in self.row_makes:
                    row[key] = min(row.get(key, 0) + nbytes, storage.nbytes())

    def end_row(self) -> None:
        """End a row of operators that one kernel would fuse."""
        if self.row_reads or self.row_makes:
            moved = sum(self.row_reads.values()) + sum(self.row_makes.values())
            self.counted["moved_fused"] += moved
            self.counted["launches_fused"] += 1
        self.row_reads, self.row_makes = {}, {}

    def release(self, key: int, nbytes: int) -> None:
        self.row_makes.pop(key, None)
        super().release(key, nbytes)


@cache
def launches(func: OpOverload) -> bool:
    """True for an operator that launches a kernel: not for views and allocations."""
    view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    return not view and not any(part in str(func) for part in FREE)


@cache
def overwrites(func: OpOverload) -> bool:
    """True for an operator that writes its first argument without reading it."""
    return func._schema.name in ("aten::copy_", "aten::zero_", "aten::fill_")


@cache
def kind_of(func: OpOverload) -> str:
    """The field of Work that an operator's FLOPs belong to."""
    if func.namespace == "unic_kernels":
        return "ladder" if func._schema.name.startswith("unic_kernels::ladder") else ""
    return "attention" if "scaled_dot_product" in func._schema.name else "matmul"


def entries(args: tuple[object, ...]) -> int:
    """Length of the longest list argument: our operators launch one kernel for each entry."""
    return max((len(x) for x in args if isinstance(x, list)), default=1)


def tensors(tree: object) -> Iterator[Tensor]:
    """Yield every tensor of nested containers once."""
    yield from {id(x): x for x in tree_iter(tree) if isinstance(x, Tensor)}.values()


def distinct_bytes(x: Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded axis counts once."""
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size() if x.numel() else 0


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, extended by the attention kernels of CPUs."""

    def forward(
        query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
    ) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(
        grad: torch.Size,
        query: torch.Size,
        key: torch.Size,
        value: torch.Size,
        *_: object,
        **__: object,
    ) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=known)
