"""Counts where a step makes the host wait for the device, and who asks for it.

On a CPU nothing waits, so reads are recognised by what is called, at two heights. A function mode
sees what Python asks a tensor for (`item`, `tolist`, `numpy`, `cpu`, truth, numbers), which on a
CPU is answered without an operator; a dispatch mode sees the operators whose answer or whose shape
the host needs, from C++ too, and every operator for counting. Both see their own thread, which is
the one that steps.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = {
    *("item", "tolist", "numpy", "cpu", "__array__", "__format__", "__repr__", "nonzero"),
    *("__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__"),
}
"""Asking a tensor for these is a read, whatever its device is here."""

FACTORIES = {"tensor", "as_tensor"}
"""These read the tensors of a list that they are given, without an operator.

With a device they upload numbers of the host; CUDA makes the host wait until such a copy is done.
"""

OPERATORS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "_assert_scalar"),
    *("nonzero", "argwhere", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors"),
}
"""Operators whose answer, or the shape of whose answer, the host must know."""

FILLS = {"masked_fill", "masked_fill_"}
"""Operators whose value CUDA reads back where it is a tensor; a CPU does that within the kernel."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"_to_copy", "copy_"}
BACKWARD = ("torch/autograd/graph.py", "_engine_run_backward")


class Read(NamedTuple):
    """One read: who asked (a key of `roots`, `backward` or `elsewhere`), where, and for what."""

    owner: str
    where: str
    what: str


class HostReads:
    """While entered, `reads` gathers every read and `operators` counts what is dispatched.

    A read belongs to the nearest frame below one of `roots`: the libraries that our code calls read
    in its name. What autograd's own nodes read belongs to `backward`: the graph, not its caller.
    """

    def __init__(self, roots: Mapping[str, Path]):
        # as imported, and behind links
        self.roots = {f"{path}/": x for x, root in roots.items() for path in (root, root.resolve())}
        self.reads: list[Read] = []
        self.operators: Counter[str] = Counter()
        self._asked = False
        self._modes: ExitStack | None = None

    def __enter__(self) -> HostReads:
        self._modes = ExitStack()
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Methods(self))
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._modes is not None
        self._modes.close()

    def of(self, owner: str) -> Counter[str]:
        """Counts of the reads of `owner`, by place and by what was asked for."""
        return Counter(f"{read.where}: {read.what}" for read in self.reads if read.owner == owner)

    def note(self, what: str) -> None:
        """A read that happens now, unless it is the inside of one that was noted."""
        if not self._asked:
            self.reads.append(Read(*self._asker(sys._getframe(1)), what))

    def _asker(self, frame: FrameType | None) -> tuple[str, str]:
        while frame is not None:
            name, file = frame.f_code.co_name, frame.f_code.co_filename
            for root, owner in self.roots.items():
                if file.startswith(root) and file != __file__:
                    return owner, f"{file.removeprefix(root)}:{name}"
            if name == BACKWARD[1] and file.endswith(BACKWARD[0]):
                return "backward", "autograd"
            frame = frame.f_back
        return "elsewhere", "?"


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.counted = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        moved = name == "to" and any(word == "cpu" for word in (*args[1:], *kwargs.values()))
        listed = name in FACTORIES and isinstance(args[0], (list, tuple)) and holds(args[0])
        uploaded = name in FACTORIES and kwargs.get("device") is not None
        uploaded |= name in ("__getitem__", "__setitem__") and contains_list(args[1])
        if not (name in METHODS or moved or listed or uploaded):
            return func(*args, **kwargs)
        self.counted.note(name)
        outer, self.counted._asked = self.counted._asked, True
        try:
            return func(*args, **kwargs)
        finally:
            self.counted._asked = outer


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.counted = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counted.operators[name] += 1
        answer = func(*args, **(kwargs or {}))
        if (
            name in OPERATORS
            or (name in INDEXING and masks(args[1]))
            or (name in FILLS and isinstance(args[2], Tensor))
            or returns(name, args, answer)
        ):
            self.counted.note(name)
        return answer


def holds(values: Any) -> bool:
    """True if there is a tensor somewhere in nested lists."""
    if isinstance(values, (list, tuple)):
        return any(map(holds, values))
    return isinstance(values, Tensor)


def contains_list(index: Any) -> bool:
    """True if an index has a list of numbers, which is uploaded to the tensor's device."""
    return isinstance(index, list) or (isinstance(index, tuple) and any(map(contains_list, index)))


def masks(indices: Any) -> bool:
    """True if one of an indexing operator's indices is a mask, whose True entries get counted."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def returns(name: str, args: Any, answer: Any) -> bool:
    """True if a copy goes from a device to the host."""
    if name not in COPIES:
        return False
    source = args[1] if name == "copy_" else args[0]
    return isinstance(source, Tensor) and source.device.type != "cpu" == answer.device.type
