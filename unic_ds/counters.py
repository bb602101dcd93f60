"""What counts operators as they run on tensors without contents: their FLOPs, and live bytes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class Unfilled(TorchFunctionMode):
    """The meta device, where initial values are not worth the second that they would take."""

    FILLS = frozenset(
        ("uniform_", "normal_", "clamp_", "erfinv_", "mul_", "add_", "fill_", "zero_", "copy_")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


class Live(TorchDispatchMode):
    """Bytes of the tensors that operators make, but for views of those given: now, and at most."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}
        self.collects = gc.isenabled()

    def __enter__(self) -> Self:
        # What cycles hold is not counted, or a peak would hang on when the collector comes by. It
        # is called where a peak grows instead, and looks at what came since.
        gc.disable()
        gc.freeze()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.unfreeze()
        if self.collects:
            gc.enable()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, Tensor):
                self.meet(value.untyped_storage())
        return found

    def meet(self, storage: Any) -> None:
        """Count a storage until it is freed."""
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        weakref.finalize(storage, self.forget, key, storage.nbytes())
        if self.now > 1.02 * self.peak:
            gc.collect()
        self.peak = max(self.peak, self.now)

    def forget(self, key: int, nbytes: int) -> None:
        """A storage is gone."""
        self.known.discard(key)
        self.now -= nbytes


def flop_counter() -> FlopCounterMode:
    """torch's counter, told of the attention that a CPU runs."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=known)
