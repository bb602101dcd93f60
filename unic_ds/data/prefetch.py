"""Read and decode the batches of a plan ahead; a broken image changes no image after it.

A thread reads bytes and headers and draws the augmentation; the decoder keeps `prefetch` batches in
flight; the thread that iterates pushes to it and pops from it, so it knows which batches are in
flight. If one of their images turns out to be broken, it is replaced by its neighbour, and all
batches in flight are pushed again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import dist
from unic_ds.data import malloc
from unic_ds.data.augmentation import Draws, draw
from unic_ds.data.decoders import Decoder, build_decoder
from unic_ds.data.reader import Reader, Sample, Undecodable, decode_error
from unic_ds.tokens import Tokens

Extras = Mapping[str, Tokens] | None
"""Cached features of a batch by teacher; None if there is no cache."""


@dataclass(frozen=True)
class Batch:
    """Images by their side in pixels, with the index and position of each."""

    images: dict[int, Tensor]  # uint8 B3HW on the device
    index_B: NDArray[np.int64]  # of the samples that are shown: the neighbour of a broken one
    position_B: NDArray[np.int64]  # in the global batch, or in the pass
    extras: Extras = None  # of the planned samples, broken or not


@dataclass(frozen=True)
class Slots:
    """The planned samples of a batch."""

    index_B: NDArray[np.int64]
    epoch_B: NDArray[np.int64]
    position_B: NDArray[np.int64]
    sides: tuple[int, ...]  # of its images, in pixels


ExtrasReader = Callable[[Slots, Executor], Callable[[], Extras]]
"""Starts reading the extras of a batch in the executor; the callable that it returns waits."""


class PendingBatch(NamedTuple):
    """A batch whose files are being read."""

    slots: Slots
    samples: list[Future[Sample]]
    extras: Callable[[], Extras]


@dataclass(frozen=True)
class EncodedBatch:
    """A batch that is read but not decoded, with its augmentation."""

    slots: Slots
    samples: list[Sample]
    draws: Draws
    extras: Extras


class Prefetcher:
    """Iterator over the batches of a plan; iterate from one thread, then close."""

    def __init__(
        self,
        reader: Reader,
        plan: Iterator[Slots],
        *,
        seed: int,
        sizes: tuple[int, ...],
        batch: int,
        device: torch.device,
        extras: ExtrasReader | None = None,
    ):
        """`sizes` are as many sides as each batch of the plan has; blur is in pixels of the first.

        `batch` is the number of images of the largest.
        """
        malloc.limit_arenas()
        self.waited_s = 0.0
        self._read_extras = extras
        self._reader, self._cfg, self._seed = reader, reader.cfg, seed
        self._sizes, self._batch, self._device = sizes, batch, device
        threads = self._cfg.threads or dist.cores()
        self._decoder = build_decoder(
            self._cfg,
            len(sizes),
            reference=sizes[0],
            batch=batch,
            depth=self._cfg.prefetch,
            threads=threads,
            device=device,
        )
        self._single: Decoder | None = None  # of one image, to find a broken one; built when needed
        self._flight: deque[EncodedBatch] = deque()
        self._ended = False
        self._stop = threading.Event()
        self._queue: queue.Queue[EncodedBatch | BaseException | None] = queue.Queue(
            self._cfg.prefetch
        )
        self._thread = threading.Thread(
            target=self._read_ahead, args=(plan,), name="unic_ds-read", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        """The next batch; ValueError if too many images cannot be read."""
        start = time.perf_counter()
        self._fill(wait=True)
        if not self._flight:
            raise StopIteration
        images = self._pop()
        batch = self._flight.popleft()
        self._fill(wait=False)
        self.waited_s += time.perf_counter() - start
        index_B = np.array([sample.index for sample in batch.samples], dtype=np.int64)
        return Batch(images, index_B, batch.slots.position_B, batch.extras)

    def close(self) -> None:
        """Stop reading and free the decoder; a second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        for decoder in filter(None, (self._decoder, self._single)):
            decoder.close()
        self._single = None
        malloc.trim()

    def _read_ahead(self, plan: Iterator[Slots]) -> None:
        """Body of the reading thread: queue all batches, then None or the exception that ended it.

        The thread that iterates raises the exception.
        """
        readers = ThreadPoolExecutor(self._cfg.readers, thread_name_prefix="unic_ds-read")
        cuda = self._device.type == "cuda"
        try:
            # A new thread's current GPU is the first, on which pinning would open a context.
            with torch.cuda.device(self._device) if cuda else nullcontext():
                for batch in self._read(plan, readers):
                    if not self._put(batch):
                        return
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            readers.shutdown(cancel_futures=True)

    def _put(self, item: EncodedBatch | BaseException | None) -> bool:
        """Queue an item; False if the prefetcher was closed instead."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _read(self, plan: Iterator[Slots], readers: Executor) -> Iterator[EncodedBatch]:
        """Read batches in the plan's order, `data.readers` files ahead of the next batch."""
        ahead, pending = -(-self._cfg.readers // self._batch), deque[PendingBatch]()
        for slots in plan:
            pending.append(self._start(slots, readers))
            if len(pending) > ahead:
                yield self._finish(pending.popleft())
        while pending:
            yield self._finish(pending.popleft())

    def _start(self, slots: Slots, readers: Executor) -> PendingBatch:
        samples = [readers.submit(self._reader.read, index) for index in slots.index_B.tolist()]
        extras = self._read_extras(slots, readers) if self._read_extras else _no_extras
        return PendingBatch(slots, samples, extras)

    def _finish(self, pending: PendingBatch) -> EncodedBatch:
        samples = [future.result() for future in pending.samples]
        draws = self._draw(pending.slots, samples)
        return EncodedBatch(pending.slots, samples, draws, pending.extras())

    def _draw(self, slots: Slots, samples: list[Sample]) -> Draws:
        """Draw the augmentation: keyed by the planned sample, in the size of the one shown."""
        width_B, height_B = [s.width for s in samples], [s.height for s in samples]
        return draw(self._seed, slots.index_B, slots.epoch_B, width_B, height_B, self._cfg)

    def _fill(self, *, wait: bool) -> None:
        """Push batches until `prefetch` are in flight; `wait` for the reading thread or return."""
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
                if sample.index in self._reader.bad:  # found broken after it was read
                    item = self._replaced(item, b)
            self._flight.append(item)
            self._push(item)

    def _push(self, batch: EncodedBatch) -> None:
        encoded = [sample.encoded for sample in batch.samples]
        self._decoder.push(encoded, batch.draws, batch.slots.sides)

    def _pop(self) -> dict[int, Tensor]:
        """Decoded images of the oldest batch in flight; broken ones are replaced."""
        while True:
            try:
                return self._decoder.pop()
            except Undecodable as error:
                self._recover(error)

    def _recover(self, error: Undecodable) -> None:
        """Replace the broken images of the first batch that has some, and push all again."""
        self._decoder.restart()
        for k, batch in enumerate(self._flight):
            repaired = self._repaired(batch)
            if repaired is not batch:
                self._flight[k] = repaired
                break
        else:  # every image decodes on its own: the images are not the cause
            raise RuntimeError(
                f"the decoder failed on a batch of images that decode one by one: {error}"
            ) from error
        for batch in self._flight:
            self._push(batch)

    def _repaired(self, batch: EncodedBatch) -> EncodedBatch:
        """`batch` with neighbours for its images that do not decode; itself if all do."""
        for b in range(len(batch.samples)):
            while reason := self._decode_error(batch, b):
                self._reader.mark(batch.samples[b].index, f"cannot be decoded ({reason})")
                batch = self._replaced(batch, b)
        return batch

    def _decode_error(self, batch: EncodedBatch, b: int) -> str:
        """The reason why image `b` does not decode; empty if it does."""
        if self._single is None:
            self._single = build_decoder(
                self._cfg,
                len(self._sizes),
                reference=self._sizes[0],
                batch=1,
                depth=1,
                threads=1,
                device=self._device,
            )
        encoded = batch.samples[b].encoded
        self._single.push([encoded], batch.draws.one(b), batch.slots.sides)
        try:
            self._single.pop()
        except Undecodable as error:
            self._single.restart()
            return decode_error(encoded) or f"PIL decodes it, this decoder does not: {error}"
        return ""

    def _replaced(self, batch: EncodedBatch, b: int) -> EncodedBatch:
        """`batch` with the next readable neighbour in slot `b`, drawn under the slot's key."""
        sample = self._reader.read(batch.samples[b].index)
        slots = batch.slots
        slot = Slots(
            *(slots.index_B[b : b + 1], slots.epoch_B[b : b + 1], slots.position_B[b : b + 1]),
            sides=slots.sides,
        )
        samples = [*batch.samples[:b], sample, *batch.samples[b + 1 :]]
        draws = batch.draws.put(b, self._draw(slot, [sample]))
        return EncodedBatch(batch.slots, samples, draws, batch.extras)


def _no_extras() -> None:
    """Read nothing."""
