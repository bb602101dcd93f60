"""Masks in COCO's notations: polygons, and run lengths as numbers or as compressed text.

Sizes are checked before anything is drawn: a few bytes may name any number of pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unic_ds.evaluate import average_precision

LONGEST = 2_000_000
"""Pixels along the outline of a polygon; the library's memory is 80 bytes each."""


class Polygons(NamedTuple):
    """Outlines of an instance."""

    points: tuple[NDArray[np.float64], ...]
    """x, y of the corners (P, 2) of each."""


class RunLengths(NamedTuple):
    """Run lengths of a mask, down the columns, the first outside of it."""

    height: int
    width: int
    counts: NDArray[np.int64] | str


Mask = Polygons | RunLengths


def parse(found: object) -> Mask | None:
    """A JSON `segmentation`; None if it is empty or absent, ValueError of one clause if wrong."""
    if not found:
        return None
    if isinstance(found, Mapping):
        return parse_run_lengths(found)
    if not isinstance(found, list):
        raise ValueError("is neither a list of polygons nor run lengths")
    points = []
    for outline in found:
        try:
            point_P2 = np.array(outline, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("has a polygon that is no list of x, y") from None
        if len(point_P2) < 3 or not np.isfinite(point_P2).all():
            raise ValueError("has a polygon of fewer than 3 corners, or of numbers not finite")
        points.append(point_P2)
    return Polygons(tuple(points))


def parse_run_lengths(found: Mapping[str, object]) -> RunLengths:
    """Run lengths of a JSON object; ValueError of one clause."""
    size, counts = found.get("size"), found.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size)):
        raise ValueError("has run lengths without a size [height, width]")
    if isinstance(counts, str):
        return RunLengths(size[0], size[1], counts)
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 2**40 for n in counts):
        raise ValueError("has run lengths that are no whole numbers")
    return RunLengths(size[0], size[1], np.array(counts, dtype=np.int64))


def drawn(mask: Mask, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (H, W) in an image; ValueError of one clause if it is not of its size."""
    if isinstance(mask, Polygons):
        return filled(mask, height, width)
    if (mask.height, mask.width) != (height, width):
        raise ValueError(f"has run lengths of {mask.width} x {mask.height} pixels")
    counts_R = inflated(mask.counts) if isinstance(mask.counts, str) else mask.counts
    if (counts_R < 0).any() or counts_R.sum() != height * width:
        raise ValueError("has run lengths that do not fill the image")
    mask_WH = np.repeat(np.arange(len(counts_R)) % 2 == 1, counts_R).reshape(width, height)
    return mask_WH.T


def filled(mask: Polygons, height: int, width: int) -> NDArray[np.bool_]:
    """The union of polygons, clipped to the image."""
    outlines = [point_P2.clip(0, [width, height]) for point_P2 in mask.points]
    length = sum(np.abs(np.roll(p_P2, 1, 0) - p_P2).max(1).sum() for p_P2 in outlines)
    if length > LONGEST:
        raise ValueError(f"has polygons with an outline of more than {LONGEST} pixels")
    rle = average_precision.library().mask
    parts = rle.frPyObjects([point_P2.flatten().tolist() for point_P2 in outlines], height, width)
    found: NDArray[np.bool_] = rle.decode(rle.merge(parts)).astype(bool)
    return found


def inflated(text: str) -> NDArray[np.int64]:
    """Run lengths of compressed text: 5 bits a character, differences to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError("has compressed run lengths that cannot be read")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift or not all(0 <= count < 2**40 for count in counts):
        raise ValueError("has compressed run lengths that cannot be read")
    return np.array(counts, dtype=np.int64)
