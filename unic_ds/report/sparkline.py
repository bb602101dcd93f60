"""Curves of one line of text, of block characters or of ASCII."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.,-=+*#"
"""Eight heights, from low to high."""

BAR, PLAIN_BAR = "█░", "#-"
"""Characters of a bar, for what is done and what is left."""


def has_blocks(encoding: str) -> bool:
    """True if an encoding has the block characters."""
    try:
        (BLOCKS + BAR).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def sparkline(value_N: NDArray[np.float64], width: int, *, blocks: bool = True) -> str:
    """The values as at most `width` heights between their extremes; blank without a finite value.

    A character stands for the mean of its values' finite ones.
    """
    heights = BLOCKS if blocks else PLAIN
    if not len(value_N) or width < 1:
        return ""
    parts = np.array_split(value_N, min(width, len(value_N)))
    kept = [np.clip(part[np.isfinite(part)], -1e300, 1e300) for part in parts]
    mean_W = np.array([part.mean() if len(part) else np.nan for part in kept])
    known_W = mean_W[np.isfinite(mean_W)]
    if not len(known_W):
        return " " * len(mean_W)
    low, span = known_W.min(), known_W.max() - known_W.min()
    if span <= 0:
        return "".join(" " if np.isnan(x) else heights[len(heights) // 2] for x in mean_W)
    level_W = (mean_W - low) / span * (len(heights) - 1)
    return "".join(" " if np.isnan(x) else heights[round(x)] for x in level_W)


def bar(share: float, width: int, *, blocks: bool = True) -> str:
    """A bar of `width` characters, of which a share is done."""
    characters = BAR if blocks else PLAIN_BAR
    count = round(min(max(share, 0.0), 1.0) * width)
    return characters[0] * count + characters[1] * (width - count)
