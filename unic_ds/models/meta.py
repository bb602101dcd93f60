"""Models on the meta device, built without computing their initial values."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class NoInit(TorchFunctionMode):
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
