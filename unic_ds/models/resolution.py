"""Sides of a step's images, their places in the decoded images, and their split into micro batches.

Axes of tensors are those of `tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

from torch import Tensor

Overlaps = tuple[tuple[slice, slice], tuple[slice, slice]]
"""Rows and columns of the student's patch grid, and of the teachers', that are compared."""


class StepShape(NamedTuple):
    """The images of an optimiser step: their sides, and how many a rank has at once."""

    sides: tuple[int, ...]  # in pixels, the student's first
    micro: int


class Shift(NamedTuple):
    """Places of the student's and the teachers' images in the decoded ones: patches down, right.

    The decoded images have `margin` patches more than the grid.
    """

    margin: int
    student: tuple[int, int]
    teachers: tuple[int, int]

    def overlaps(self, grid: int) -> Overlaps:
        """The rows and columns of the two grids that show the same patches of an image."""
        ours, theirs = [], []
        for student, teachers in zip(self.student, self.teachers, strict=True):
            ahead = teachers - student
            ours.append(slice(max(0, ahead), grid + min(0, ahead)))
            theirs.append(slice(max(0, -ahead), grid + min(0, -ahead)))
        return (ours[0], ours[1]), (theirs[0], theirs[1])


class Resolution(NamedTuple):
    """Sides of an optimiser step's images in pixels, and their split into micro batches."""

    size: int  # of the student's images
    grid: int  # side of the student's patch grid
    sides: Mapping[str, int]  # of the images of each teacher that is run
    micro_batch: int  # images of a rank at once
    micro_batches: int  # of an optimiser step
    shift: Shift | None = None

    def decoded(self, side: int) -> int:
        """Side of the decoded images that a model's images of side `side` are cut from."""
        return side + ceil(side * self.shift.margin / self.grid) if self.shift else side

    def student_images(self, images: Mapping[int, Tensor]) -> Tensor:
        """The student's images [B, 3, size, size] of a batch, keyed by their decoded side."""
        at = self.shift.student if self.shift else (0, 0)
        return self.cut(images[self.decoded(self.size)], self.size, at)

    def teacher_images(self, images: Mapping[int, Tensor], name: str) -> Tensor:
        """A teacher's images of a batch."""
        at = self.shift.teachers if self.shift else (0, 0)
        return self.cut(images[self.decoded(self.sides[name])], self.sides[name], at)

    def cut(self, image_B3HW: Tensor, side: int, at: tuple[int, int]) -> Tensor:
        """The part of the images that begins so many patches of the grid below and right.

        To a pixel, if the side is no multiple of the grid, as with a CNN.
        """
        if not self.shift:
            return image_B3HW
        top, left = (round(patches * side / self.grid) for patches in at)
        return image_B3HW[:, :, top : top + side, left : left + side].contiguous()
