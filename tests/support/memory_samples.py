"""Samples in memory, and models whose patch tokens are a function of the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unic_ds.evaluate.features import Annotation, Model, Outputs
from unic_ds.evaluate.samples import UnreadableImage


@dataclass(frozen=True)
class MemorySamples:
    """A set of samples in memory (`samples.SampleSet`); None stands for one that is broken."""

    samples: Sequence[Any]
    annotations: frozenset[Annotation]
    classes: tuple[str, ...] = ()
    name: str = "memory"
    identity: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, place: int) -> Any:
        """The sample; UnreadableImage for None."""
        if self.samples[place] is None:
            raise UnreadableImage(f"{place}.png is cut off")
        return self.samples[place]


def patch_model(
    name: str, size: int, patch: int, feature: Callable[[Tensor], Tensor], **more: Any
) -> Model:
    """A model whose patch token is a function of the patch's mean colour in [0, 1], (B, N, 3)."""

    def encode(image_B3SS: Tensor, needs: frozenset[str]) -> Outputs:
        assert needs == {"patch"} and image_B3SS.dtype == torch.uint8
        assert image_B3SS.shape[1:] == (3, size, size)
        with torch.inference_mode():
            mean_BN3 = F.avg_pool2d(image_B3SS.float() / 255, patch).flatten(2).transpose(1, 2)
            return Outputs(patch_BNC=feature(mean_BN3))

    return Model(name, size, frozenset({"patch"}), encode, patch=patch, **more)


def save(image_3HW: Tensor, file: Path) -> None:
    """Write a uint8 image in the format of the file's name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(image_3HW.permute(1, 2, 0).numpy())).save(file)
