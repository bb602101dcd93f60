"""The first images of a start as training sees them, for a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from unic_ds import dist
from unic_ds.data import Batch


class FirstImages:
    """Iterator over micro batches that copies the first one's images on rank 0; no host read."""

    def __init__(
        self, batches: Iterator[Batch], *, count: int, images_of: Callable[[Batch], Tensor]
    ):
        """Keep at most `count` images (0: none) of `images_of` the first batch, the student's."""
        self.batches, self.images_of = batches, images_of
        self.count = count if dist.rank() == 0 else 0
        self.image_B3HW: Tensor | None = None

    def __iter__(self) -> FirstImages:
        return self

    def __next__(self) -> Batch:
        batch = next(self.batches)
        if self.count:
            self.image_B3HW = self.images_of(batch)[: self.count].clone()
            self.count = 0
        return batch

    def take(self) -> Tensor | None:
        """The images, once: the next call returns None, as all calls before the first batch."""
        taken, self.image_B3HW = self.image_B3HW, None
        return taken
