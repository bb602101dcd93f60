"""log.jsonl: a line for each log line, at nine digits. It has no pictures, texts or histograms."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unic_ds.files import write_atomic
from unic_ds.training.trackers.tracker import End, Row


class JsonLines:
    """A file of JSON lines, which begins with those of earlier starts."""

    def __init__(self, file: Path, kept: Iterable[Mapping[str, object]] | None):
        """`kept` replaces the lines of earlier starts; with None all of them stay."""
        if kept is not None:
            write_atomic(file, "".join(json.dumps(row) + "\n" for row in kept))
        self.lines = file.open("a", buffering=1)

    def scalars(self, row: Row, *, step: int) -> None:
        """Append a line."""
        values = {"step": step} | {name: json_value(value) for name, value in row.items()}
        self.lines.write(json.dumps(values) + "\n")

    def histogram(self, name: str, value_N: NDArray[np.floating], *, step: int) -> None:
        """Add nothing."""

    def picture(self, name: str, image_HW3: NDArray[np.uint8], *, caption: str, step: int) -> None:
        """Add nothing."""

    def text(self, name: str, text: str, *, step: int) -> None:
        """Add nothing."""

    def close(self, end: End) -> None:
        """Close the file."""
        self.lines.close()


def json_value(value: float | None) -> float | str | None:
    """A float at nine digits, or its name if it is not finite: JSON has no NaN."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value
