"""Decode and augment with DALI: one graph for the CPU and, with nvJPEG, for the GPU.

The only module that imports DALI, which is optional. DALI draws no random numbers: the augmentation
parameters are inputs. One image that cannot be decoded fails the whole pipeline, so the caller
finds it with a decoder of one image, and restarts this one.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from unic_ds.data import augmentation
from unic_ds.data.augmentation import Draws
from unic_ds.data.reader import Undecodable

Inputs = dict[str, NDArray[np.generic] | list[NDArray[np.uint8]]]
"""Inputs of the graph by name."""

INVERTED = [float(min(v, 255 - v)) for v in range(256)]  # solarise at 0.5


class Event(Protocol):
    """The methods of torch.cuda.Event that are used."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class LentOutputs:
    """Keeps DALI's outputs alive until torch's stream has copied them.

    `share_outputs` makes torch's stream wait for DALI's, but DALI does not wait for torch's: the
    memory of an output without references returns to DALI's pool while the copy is still queued,
    and the next batch overwrites it.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Event, object]] = deque()

    def keep(self, outputs: object, copied: Event) -> None:
        """Keep `outputs` until the event `copied`; release those whose event has passed."""
        while self._waiting and self._waiting[0][0].query():
            self._waiting.popleft()
        self._waiting.append((copied, outputs))

    def wait(self) -> None:
        """Wait for all copies and release the outputs."""
        for copied, _ in self._waiting:
            copied.synchronize()
        self._waiting.clear()


class Decoder:
    """Decodes batches of at most `batch` images in the order of `push`, `depth` at a time.

    Each image is resized to `outputs` sides, which may differ from batch to batch.
    """

    _pipe: Pipeline
    _pushed: int  # batches since the last restart
    _error: RuntimeError | None
    _last: Inputs  # of the newest batch

    def __init__(
        self,
        outputs: int,
        *,
        reference: int,
        batch: int,
        depth: int,
        threads: int,
        colour: bool,
        device: torch.device,
    ):
        """Blur is in pixels of images of side `reference`."""
        self.outputs, self.reference, self.colour = outputs, reference, colour
        self.device, self._depth = device, depth
        self._gpu = device.type == "cuda"
        gpu = torch.cuda.current_device() if self._gpu and device.index is None else device.index
        self._options = {
            "batch_size": batch,
            "num_threads": threads,
            "prefetch_queue_depth": depth,
            "device_id": gpu if self._gpu else None,  # None, not -1, is DALI without a GPU
        }
        self._lent = LentOutputs()
        self.restart()

    def push(self, encoded: list[NDArray[np.uint8]], draws: Draws, sides: tuple[int, ...]) -> None:
        """Start a batch of images with their augmentation; `pop` raises its errors.

        `sides` in pixels: one for each output.
        """
        self._last = self._inputs(draws, sides) | {"encoded": encoded}
        try:
            self._feed(self._last)
        except RuntimeError as error:  # an earlier batch has failed
            self._error = error

    def pop(self) -> dict[int, Tensor]:
        """uint8 B3HW of the oldest batch by side; Undecodable if an image in flight is broken."""
        try:
            if self._error:
                raise self._error
            while self._pushed < self._depth:  # DALI waits for `depth` batches: repeat the newest
                self._feed(self._last)
            return self._outputs()
        except (RuntimeError, IndexError) as error:
            raise Undecodable(_cause(error)) from error

    def restart(self) -> None:
        """Drop all batches in flight, and an error."""
        self._lent.wait()
        self._pipe = graph(self.outputs, colour=self.colour, gpu=self._gpu, **self._options)
        self._pipe.build()
        self._pushed = 0
        self._error = None

    def close(self) -> None:
        """Free the pipeline's threads and memory."""
        self._lent.wait()
        del self._pipe

    def _inputs(self, draws: Draws, sides: tuple[int, ...]) -> Inputs:
        """The inputs of the graph without the encoded images."""
        inputs: Inputs = {
            "start": np.ascontiguousarray(draws.window_B4[:, :2]),
            "shape": np.ascontiguousarray(draws.window_B4[:, 2:]),
        }
        mirror_B = np.where(draws.flip_B, -1, 1)  # a negative width mirrors
        side_B2 = np.stack([np.ones_like(mirror_B), mirror_B], -1).astype(np.float32)
        inputs |= {f"side_{i}": side * side_B2 for i, side in enumerate(sides)}
        if not self.colour:
            return inputs
        inputs["pixel"], inputs["mean"] = augmentation.colour(draws)
        inputs["colours"] = draws.coloured_B
        inputs["blurs"], inputs["solarises"] = draws.sigma_B > 0, draws.solarise_B
        for i, side in enumerate(sides):
            inputs[f"sigma_{i}"] = draws.sigma_B * np.float32(side / self.reference)
            window = 2 * augmentation.blur_radius(side, self.reference) + 1
            inputs[f"window_{i}"] = np.full((len(draws.sigma_B), 1), window, dtype=np.int32)
        return inputs

    def _feed(self, inputs: Inputs) -> None:
        for name, value in inputs.items():
            self._pipe.feed_input(name, value)
        self._pushed += 1
        if self._pushed >= self._depth:
            self._pipe.schedule_run()

    def _outputs(self) -> dict[int, Tensor]:
        """Copies of the oldest outputs, on a GPU queued on torch's stream without a host sync."""
        stream = torch.cuda.current_stream(self.device) if self._gpu else None
        outputs = self._pipe.share_outputs(stream.cuda_stream if stream else None)
        images = {}
        for output in outputs:
            image_B3HW = from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
            side = image_B3HW.shape[-1]
            images[side] = image_B3HW.clone(memory_format=torch.contiguous_format)
        if stream:
            self._lent.keep(outputs, stream.record_event())
        self._pipe.release_outputs()
        return images


def _cause(error: Exception) -> str:
    """The line with the cause from DALI's message, without its tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return lines[after].rstrip(" :") if after < len(lines) else "DALI gave no reason"


@pipeline_def(enable_conditionals=True)
def graph(outputs: int, *, colour: bool, gpu: bool) -> tuple[DataNode, ...]:
    """Build the graph: encoded images and augmentation -> uint8 BHW3 outputs of their sides."""
    window_HW3 = fn.decoders.image_slice(
        _input("encoded", types.UINT8, 1),
        start=_input("start", types.INT32, 1),
        shape=_input("shape", types.INT32, 1),
        axis_names="WH",
        device="mixed" if gpu else "cpu",
    )
    images = [_resize(window_HW3, i) for i in range(outputs)]
    return tuple(_recolour(images, gpu) if colour else images)


def _recolour(images: list[DataNode], gpu: bool) -> list[DataNode]:
    """Colour, blur and solarise at every side; the mean colour is that of the first."""
    mean_13 = fn.reshape(fn.reductions.mean(images[0], axes=(0, 1)), shape=[1, 3])
    if gpu:
        mean_13 = mean_13.cpu()  # named arguments are read on the host
    shift_13 = fn.coord_transform(mean_13, M=_input("mean", types.FLOAT, 2))
    shift_3 = fn.reshape(shift_13, shape=[3])
    pixel_33 = _input("pixel", types.FLOAT, 2)
    colours, blurs, solarises = (
        _input(name, types.BOOL, 0) for name in ("colours", "blurs", "solarises")
    )
    done = []
    for i, image_HW3 in enumerate(images):
        if colours:
            image_HW3 = fn.coord_transform(image_HW3, M=pixel_33, T=shift_3, dtype=types.UINT8)
        if blurs:
            image_HW3 = fn.gaussian_blur(
                image_HW3,
                sigma=_input(f"sigma_{i}", types.FLOAT, 0),
                window_size=_input(f"window_{i}", types.INT32, 1),
            )
        if solarises:
            image_HW3 = fn.lookup_table(
                image_HW3, keys=list(range(256)), values=INVERTED, dtype=types.UINT8
            )
        done.append(image_HW3)
    return done


def _input(name: str, dtype: types.DALIDataType, ndim: int) -> DataNode:
    return fn.external_source(name=name, batch=True, dtype=dtype, ndim=ndim)


def _resize(window_HW3: DataNode, output: int) -> DataNode:
    side_2 = _input(f"side_{output}", types.FLOAT, 1)
    return fn.resize(window_HW3, size=side_2, interp_type=types.INTERP_CUBIC, antialias=True)
