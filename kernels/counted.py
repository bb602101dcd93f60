"""Costs of a computation, counted without a device: launches, bytes, memory that autograd keeps.

Everything is seen from torch's dispatcher, so it may run on the meta device at full size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = ("empty", "_unsafe_view", "detach", "lift_fresh")
"""Parts of the names of operations that launch nothing, beside views."""
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default")
"""Parts of the names of operations for which the host waits."""


class Launches(TorchDispatchMode):
    """Counts operations that compute, the bytes they read and write, host syncs, ours by name.

    An operation reads its tensors and writes its results once; of a view, only its elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = self.syncs = 0
        self.ours: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and not any(free in name for free in FREE):
            self.count += 1
            if name.startswith("unic_kernels"):
                self.ours[func._schema.name] += 1
            self.syncs += any(sync in name for sync in SYNCS)
            self.bytes += sum(map(size, tensors((args, kwargs, result))))
        return result


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield every tensor of a nested structure once."""
    found = {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}
    yield from found.values()


def size(x: Tensor) -> int:
    """Return the bytes of a tensor; an expanded axis counts once."""
    seen = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return int(torch.Size(seen).numel()) * x.element_size() if x.numel() else 0


def kept_bytes(run: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for backward, each storage once, without `known`."""
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    outside = {tensor.untyped_storage()._cdata for tensor in known}
    del result
    return sum(nbytes for storage, nbytes in found.items() if storage not in outside)
