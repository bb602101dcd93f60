"""TensorBoard: event files in RUN/tb."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from unic_ds.files import encodable
from unic_ds.training.trackers.groups import group_of
from unic_ds.training.trackers.tracker import End, Row

BINS = 20
"""Bins of a histogram, which takes 16 bytes for each: a long run has a million histograms."""


class TensorBoard:
    """An event file of this start, which takes back what others wrote from step `first` on."""

    def __init__(self, folder: Path, *, first: int):
        folder.mkdir(exist_ok=True)
        self.board = SummaryWriter(str(encodable(folder)), purge_step=first)

    def scalars(self, row: Row, *, step: int) -> None:
        """Add the known values, in their groups."""
        for name, value in row.items():
            if value is not None:
                self.board.add_scalar(group_of(name), value, step)

    def histogram(self, name: str, value_N: NDArray[np.floating], *, step: int) -> None:
        """Add a histogram."""
        self.board.add_histogram(group_of(name), value_N, step, bins=BINS)

    def picture(self, name: str, image_HW3: NDArray[np.uint8], *, caption: str, step: int) -> None:
        """Add an image, with its caption as a text."""
        self.board.add_image(name, image_HW3, step, dataformats="HWC")
        self.text(f"{name}/caption", caption, step=step)

    def text(self, name: str, text: str, *, step: int) -> None:
        """Add a text; TensorBoard would take it for Markdown."""
        self.board.add_text(name, f"<pre>{html.escape(text)}</pre>", step)

    def close(self, end: End) -> None:
        """Write what is left."""
        self.board.close()
