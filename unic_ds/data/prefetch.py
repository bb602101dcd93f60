"""A plan's batches, read and decoded ahead; a broken image moves none after it.

A thread reads bytes and headers and draws; the decoder keeps `prefetch` batches in flight; whoever
iterates pushes and pops, so it is known which batch is where. An image that turns out to be broken
is found, replaced by its neighbour, and everything in flight is pushed again.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import dist
from unic_ds.config import Data
from unic_ds.data import malloc
from unic_ds.data.augmentation import Draws, draw
from unic_ds.data.reader import Reader, Sample, Undecodable, fault

log = logging.getLogger("unic_ds.data")


@dataclass(frozen=True)
class Batch:
    """Images by their side in pixels, and who they are."""

    images: dict[int, Tensor]  # uint8 B3HW on the device
    index_B: NDArray[np.int64]  # the samples that are shown: a replaced one is its neighbour
    position_B: NDArray[np.int64]  # in the global batch, or in the pass
    beside: Any = None  # what the stream's caller has read for the planned samples


@dataclass(frozen=True)
class Slots:
    """What a batch is to hold, before anything is read."""

    index_B: NDArray[np.int64]
    epoch_B: NDArray[np.int64]
    position_B: NDArray[np.int64]


Beside = Callable[[Slots, Executor], Callable[[], Any]]
"""Starts reading what else is known of a batch's slots; what it returns waits for it."""


class Reading(NamedTuple):
    """A batch whose files are being read."""

    slots: Slots
    samples: list[Future[Sample]]
    beside: Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """A batch that is read and drawn but not decoded."""

    slots: Slots
    samples: list[Sample]
    draws: Draws
    beside: Any


class Decoder(Protocol):
    """What dali.py and twin.py offer."""

    def push(self, encoded: list[NDArray[np.uint8]], draws: Draws) -> None: ...
    def pop(self) -> dict[int, Tensor]: ...
    def restart(self) -> None: ...
    def close(self) -> None: ...


def backend(cfg: Data) -> str:
    """dali or torch: what decodes here; ValueError where DALI is asked for by name and missing."""
    if cfg.backend == "torch":
        return "torch"
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        if cfg.backend == "dali":
            cuda = (torch.version.cuda or "13").partition(".")[0]
            remedy = f"pip install -e '.[cuda{cuda}]', or set data.backend torch"
            raise ValueError(f"data.backend 'dali' is not to be had ({error}); {remedy}") from error
        log.warning("DALI is not to be had (%s): the torch twin decodes, on the CPU", error)
        return "torch"
    return "dali"


def decoder(
    cfg: Data, sizes: tuple[int, ...], *, batch: int, depth: int, threads: int, device: torch.device
) -> Decoder:
    """The decoder of `cfg.backend`; ValueError where DALI is asked for by name and missing.

    `auto` is DALI wherever it can be imported, on CPU and GPU alike: one set of pixels.
    """
    name = "dali_decoder" if backend(cfg) == "dali" else "torch_decoder"
    room = importlib.import_module(f"unic_ds.data.{name}")
    colour = cfg.augment == "unic"
    made: Decoder = room.Decoder(
        sizes, batch=batch, depth=depth, threads=threads, colour=colour, device=device
    )
    return made


class Prefetcher:
    """The batches of a plan in its order; iterate from one thread, then close."""

    def __init__(
        self,
        reader: Reader,
        plan: Iterator[Slots],
        *,
        seed: int,
        sizes: tuple[int, ...],
        batch: int,
        device: torch.device,
        beside: Beside | None = None,
    ):
        malloc.limit_arenas()
        self.waited_s = 0.0
        self._beside = beside
        self._reader, self._cfg, self._seed = reader, reader.cfg, seed
        self._sizes, self._batch, self._device = sizes, batch, device
        threads = self._cfg.threads or dist.cores()
        self._decoder = decoder(
            self._cfg, sizes, batch=batch, depth=self._cfg.prefetch, threads=threads, device=device
        )
        self._alone: Decoder | None = None  # of one image, to find a bad one; made when needed
        self._flight: deque[Work] = deque()
        self._ended = False
        self._stop = threading.Event()
        self._queue: queue.Queue[Work | BaseException | None] = queue.Queue(self._cfg.prefetch)
        self._thread = threading.Thread(
            target=self._read_ahead, args=(plan,), name="unic_ds-read", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        """The next batch; ValueError when too many images cannot be read."""
        start = time.perf_counter()
        self._fill(wait=True)
        if not self._flight:
            raise StopIteration
        images = self._pop()
        work = self._flight.popleft()
        self._fill(wait=False)
        self.waited_s += time.perf_counter() - start
        index_B = np.array([sample.index for sample in work.samples], dtype=np.int64)
        return Batch(images, index_B, work.slots.position_B, work.beside)

    def close(self) -> None:
        """Stop reading and free the decoder; closing again does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        for made in filter(None, (self._decoder, self._alone)):
            made.close()
        self._alone = None
        malloc.trim()

    def _read_ahead(self, plan: Iterator[Slots]) -> None:
        """The reading thread: plan -> queue, then None, or the exception that ended it."""
        readers = ThreadPoolExecutor(self._cfg.readers, thread_name_prefix="unic_ds-read")
        cuda = self._device.type == "cuda"
        try:
            # A new thread's current GPU is the first, on which pinning would open a context.
            with torch.cuda.device(self._device) if cuda else nullcontext():
                for work in self._read(plan, readers):
                    if not self._put(work):
                        return
            self._put(None)
        except BaseException as error:  # raised in the thread that iterates, which waits for it
            self._put(error)
        finally:
            readers.shutdown(cancel_futures=True)

    def _put(self, item: Work | BaseException | None) -> bool:
        """Queue an item; False when the feed was closed instead."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _read(self, plan: Iterator[Slots], readers: Executor) -> Iterator[Work]:
        """Batches in the plan's order; `data.readers` files are asked for beyond the next one's."""
        ahead, reading = -(-self._cfg.readers // self._batch), deque[Reading]()
        for slots in plan:
            reading.append(self._begin(slots, readers))
            if len(reading) > ahead:
                yield self._finish(reading.popleft())
        while reading:
            yield self._finish(reading.popleft())

    def _begin(self, slots: Slots, readers: Executor) -> Reading:
        samples = [readers.submit(self._reader.read, index) for index in slots.index_B.tolist()]
        return Reading(slots, samples, self._beside(slots, readers) if self._beside else _nothing)

    def _finish(self, reading: Reading) -> Work:
        samples = [future.result() for future in reading.samples]
        return Work(reading.slots, samples, self._draw(reading.slots, samples), reading.beside())

    def _draw(self, slots: Slots, samples: list[Sample]) -> Draws:
        """Draws keyed by the planned sample, in windows of the sample that is shown."""
        width_B, height_B = [s.width for s in samples], [s.height for s in samples]
        return draw(self._seed, slots.index_B, slots.epoch_B, width_B, height_B, self._cfg)

    def _fill(self, *, wait: bool) -> None:
        """Push what is read until `prefetch` batches are in flight; wait for the reader if told."""
        while not self._ended and len(self._flight) < self._cfg.prefetch:
            try:
                item = self._queue.get(block=wait)
            except queue.Empty:
                return
            if isinstance(item, BaseException):
                self._ended = True
                raise item
            if item is None:
                self._ended = True
                return
            for b, sample in enumerate(item.samples):
                if sample.index in self._reader.bad:  # found since it was read
                    item = self._replaced(item, b)
            self._flight.append(item)
            self._decoder.push([s.encoded for s in item.samples], item.draws)

    def _pop(self) -> dict[int, Tensor]:
        """Images of the oldest batch in flight, mended until it decodes."""
        while True:
            try:
                return self._decoder.pop()
            except Undecodable as error:
                self._mend(error)

    def _mend(self, error: Undecodable) -> None:
        """Replace what cannot be decoded in the first batch that has such, and push all again."""
        self._decoder.restart()
        for k, work in enumerate(self._flight):
            mended = self._mended(work)
            if mended is not work:
                self._flight[k] = mended
                break
        else:  # every image decodes alone: not the images' fault
            raise RuntimeError(
                f"the decoder failed on images that are sound one by one: {error}"
            ) from error
        for work in self._flight:
            self._decoder.push([s.encoded for s in work.samples], work.draws)

    def _mended(self, work: Work) -> Work:
        """`work` with neighbours for its images that do not decode; `work` itself if all do."""
        for b in range(len(work.samples)):
            while reason := self._fault(work, b):
                self._reader.mark(work.samples[b].index, f"cannot be decoded ({reason})")
                work = self._replaced(work, b)
        return work

    def _fault(self, work: Work, b: int) -> str:
        """Why image `b` does not decode; empty if it does."""
        if self._alone is None:
            self._alone = decoder(
                self._cfg, self._sizes, batch=1, depth=1, threads=1, device=self._device
            )
        encoded = work.samples[b].encoded
        self._alone.push([encoded], work.draws.one(b))
        try:
            self._alone.pop()
        except Undecodable as error:
            self._alone.restart()
            return fault(encoded) or f"PIL decodes it, this decoder does not: {error}"
        return ""

    def _replaced(self, work: Work, b: int) -> Work:
        """`work` with the next readable neighbour in slot `b`, under the slot's own draw key."""
        sample = self._reader.read(work.samples[b].index)
        slot = Slots(
            *(a[b : b + 1] for a in (work.slots.index_B, work.slots.epoch_B, work.slots.position_B))
        )
        samples = [*work.samples[:b], sample, *work.samples[b + 1 :]]
        draws = work.draws.put(b, self._draw(slot, [sample]))
        return Work(work.slots, samples, draws, work.beside)


def _nothing() -> None:
    """Stand for a batch beside which nothing is read."""
