"""Models on the meta device, built without computing their initial values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.overrides import TorchFunctionMode


class NoInit(TorchFunctionMode):
    """Mode in which tensors on the meta device are not initialised, which saves about a second."""

    FILLS = frozenset(
        ("uniform_", "normal_", "clamp_", "erfinv_", "mul_", "add_", "fill_", "zero_", "copy_")
    )

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if getattr(func, "__name__", "") in self.FILLS:
            tensor = args[0] if args else (kwargs or {})["tensor"]
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))
