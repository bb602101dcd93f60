"""A CPU that DeepSpeed takes for a device with streams, under torch's own race detector.

Work is done when it is queued, so results are those of a CPU; what is recorded is which stream each
operator was queued on and which streams had been waited for. `torch.cuda._sanitizer` then finds
operators on two streams that use the same memory in no order. Memory counts by storage and is kept
until the end, since an allocator of a device keeps a pool for each stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.cuda._sanitizer import ArgumentHandler, EventHandler
from torch.utils._python_dispatch import TorchDispatchMode

FACTORIES = ("new_", "empty_like", "zeros_like", "ones_like", "full_like")
"""Operators that take no values from the tensor they are given."""


class Stream:
    """The part of torch.cuda.Stream that DeepSpeed uses."""

    device: OrderedDevice

    def __init__(self) -> None:
        self.number = next(self.device.numbers)

    def wait_stream(self, other: Stream) -> None:
        """Queue what comes after what the other stream has now."""
        event = Event()
        event.record(other)
        self.wait_event(event)

    def wait_event(self, event: Event) -> None:
        """Queue what comes after an event."""
        self.device.order._handle_event_wait(event.number, self.number)

    def synchronize(self) -> None:
        """Count a wait of the host for one stream."""
        self.device.host_waits["stream"] += 1
        self.device.order._handle_stream_synchronization(self.number)


class Event:
    """The part of torch.cuda.Event that DeepSpeed uses."""

    device: OrderedDevice

    def __init__(self, **_: Any) -> None:
        self.number = next(self.device.numbers)

    def record(self, stream: Stream | None = None) -> None:
        """Mark a place in a stream."""
        stream = stream or self.device.current
        self.device.order._handle_event_record(self.number, stream.number)

    def query(self) -> bool:
        """Say that the device has passed it: work is done when it is queued."""
        return True

    def synchronize(self) -> None:
        """Count a wait of the host for an event."""
        self.device.host_waits["event"] += 1
        self.device.order._handle_event_synchronization(self.number)


class OrderedDevice(CPU_Accelerator):
    """The accelerator; counts where the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.order, self.numbers = EventHandler(), count()
        self.host_waits: Counter[str] = Counter()
        Stream.device = Event.device = self
        self.default = self.current = Stream()

    def is_synchronized_device(self) -> bool:
        """Make DeepSpeed take the branches of a GPU."""
        return False

    def use_host_timers(self) -> bool:
        """Leave DeepSpeed's timers to the host's clock."""
        return True

    def synchronize(self, device_index: int | None = None) -> None:
        """Count a wait of the host for everything that is queued."""
        self.host_waits["device"] += 1
        self.order._handle_device_synchronization()

    Stream = property(lambda self: Stream)
    Event = property(lambda self: Event)

    def current_stream(self, device_index: int | None = None) -> Stream:
        """Return the stream that operators are queued on."""
        return self.current

    def default_stream(self, device_index: int | None = None) -> Stream:
        """Return the stream of everything that names no other."""
        return self.default

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Queue on another stream."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Storages(ArgumentHandler):
    """The storages that an operator reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.UntypedStorage] = []

    def _handle_argument(
        self,
        value: Any,
        is_write: bool,
        metadata_only: bool,
        name: str | None = None,
        is_output: bool = False,
    ) -> None:
        if not isinstance(value, Tensor) or not value.numel():
            return
        self.kept.append(value.untyped_storage())
        at = self.kept[-1].data_ptr()
        if is_write:
            self.dataptrs_written.add(at)
        elif not metadata_only:
            self.dataptrs_read.add(at)
        self.tensor_aliases.setdefault(at, []).append(name or "output")


class Races(TorchDispatchMode):
    """Operators that use memory in no order with one on another stream, and memory that could be.

    An allocator gives freed memory to the stream that allocated it, in the order of the host. So
    the default stream must come after `reduces` when gradients and buckets are freed, and `reduces`
    after the default stream's step when it takes new memory.
    """

    def __init__(self, device: OrderedDevice, reduces: Stream):
        super().__init__()
        self.device, self.reduces, self.found = device, reduces, Counter[str]()
        device.order = EventHandler()  # memory of a run before is no longer held
        self.kept: list[torch.UntypedStorage] = []
        self.step_end = -1

    def done(self, stream: Stream, by: Stream) -> int:
        """Return the number of the last operator of a stream that another comes after."""
        return self.device.order.syncs.current_sync_states[by.number].get(stream.number, -1)

    def end_backward(self) -> None:
        """Find reductions that the default stream does not come after."""
        if self.done(self.reduces, by=self.device.default) < self.done(self.reduces, self.reduces):
            self.found["the default stream does not come after the reductions"] += 1

    def end_step(self) -> None:
        """Note how far the default stream is."""
        self.step_end = self.done(self.device.default, by=self.device.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used, factory = Storages(), func.overloadpacket.__name__.startswith(FACTORIES)
        used.parse_inputs(func._schema, args, kwargs or {}, is_factory=factory)
        answer = func(*args, **(kwargs or {}))
        used.parse_outputs(func._schema, answer, is_factory=factory)
        self.kept += used.kept
        errors = self.device.order._handle_kernel_launch(
            self.device.current.number,
            used.dataptrs_read - used.dataptrs_written,
            used.dataptrs_written,
            used.outputs,
            str(func),
            used.tensor_aliases,
        )
        reduces = self.device.current is self.reduces
        if reduces and self.done(self.device.default, by=self.reduces) < self.step_end:
            self.found[f"{func} does not come after the step before"] += 1
        self.found.update(
            f"{error.current_access.operator} after {error.previous_access.operator}"
            for error in errors
        )
        return answer


def install() -> OrderedDevice:
    """Make DeepSpeed of this process use such a device."""
    device = OrderedDevice()
    set_accelerator(device)
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    return device
