"""A tracker: something that a run's log is written to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from unic_ds.config import Config

Row = Mapping[str, float | None]
"""Values of a log line by their names in log.jsonl; None for one that is not known."""


End = Literal["finished", "stopped", "failed"]
"""The end of a start: `stopped` if a later one goes on, `failed` if an exception ended it."""


class Tracker(Protocol):
    """A record of a run that goes on if the run is resumed; an exception means that it is lost."""

    def scalars(self, row: Row, *, step: int) -> None:
        """Add a log line."""

    def histogram(self, name: str, value_N: NDArray[np.floating], *, step: int) -> None:
        """Add the distribution of finite values."""

    def picture(self, name: str, image_HW3: NDArray[np.uint8], *, caption: str, step: int) -> None:
        """Add an image."""

    def text(self, name: str, text: str, *, step: int) -> None:
        """Add a text, as it is."""

    def close(self, end: End) -> None:
        """Write all that is left, and end this start's part of the record."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of a run, as a service has to know it."""

    folder: Path
    cfg: Config

    @property
    def name(self) -> str:
        """Name of the run: that of its folder, of a stage `RUN/stage1`."""
        folder = self.folder.absolute()
        inner = folder.name.removeprefix("stage")
        return f"{folder.parent.name}/{folder.name}" if inner.isdecimal() else folder.name
