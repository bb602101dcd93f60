"""Choose the decoder of a run: DALI, or torchvision in threads."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds.config import Data
from unic_ds.data import torch_decoder
from unic_ds.data.augmentation import Draws

log = logging.getLogger("unic_ds.data")


class Decoder(Protocol):
    """The interface of dali_decoder.Decoder and torch_decoder.Decoder."""

    def push(
        self, encoded: list[NDArray[np.uint8]], draws: Draws, sides: tuple[int, ...]
    ) -> None: ...
    def pop(self) -> dict[int, Tensor]: ...
    def restart(self) -> None: ...
    def close(self) -> None: ...


def backend(cfg: Data) -> str:
    """The decoder that is used, `dali` or `torch`.

    ValueError if DALI is asked for by name and cannot be imported.
    """
    if cfg.backend == "torch":
        return "torch"
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        if cfg.backend == "dali":
            cuda = (torch.version.cuda or "13").partition(".")[0]
            remedy = f"run pip install -e '.[cuda{cuda}]', or set data.backend torch"
            raise ValueError(
                f"data.backend 'dali' cannot be used: DALI cannot be imported ({error}); {remedy}"
            ) from error
        log.warning("DALI cannot be imported (%s): the torch decoder runs, on the CPU", error)
        return "torch"
    return "dali"


def build_decoder(
    cfg: Data,
    outputs: int,
    *,
    reference: int,
    batch: int,
    depth: int,
    threads: int,
    device: torch.device,
) -> Decoder:
    """Build the decoder of `cfg.backend`; errors as `backend`.

    It resizes each image to `outputs` sides; blur is in pixels of images of side `reference`.

    `auto` is DALI wherever it can be imported, on CPU and GPU alike, so that the pixels are equal.
    """
    make: Callable[..., Decoder] = torch_decoder.Decoder
    if backend(cfg) == "dali":
        from unic_ds.data import dali_decoder

        make = dali_decoder.Decoder
    colour = cfg.augment == "unic"
    return make(
        outputs,
        reference=reference,
        batch=batch,
        depth=depth,
        threads=threads,
        colour=colour,
        device=device,
    )
