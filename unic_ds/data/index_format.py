"""The arrays of an index of tar shards, and the check that they fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unic_ds.data.string_table import StringTable
from unic_ds.data.tar_headers import BLOCK

FORMAT = 1
SPARE = 1 << 20
"""Classes beyond one per image, which classes.txt may list."""

Tables = dict[str, NDArray[Any]]
ARRAYS: Mapping[str, tuple[type[np.integer[Any]], tuple[str | int, ...]]] = {
    "format": (np.int64, ()),
    "shards": (np.uint8, ("bytes",)),
    "bytes_S": (np.int64, ("S",)),
    "mtime_S": (np.int64, ("S",)),
    "head_S": (np.uint8, ("S", 32)),
    "names": (np.uint8, ("bytes",)),
    "classes": (np.uint8, ("bytes",)),
    "label_N": (np.int32, ("N",)),
    "shard_N": (np.int32, ("N",)),
    "offset_N": (np.int64, ("N",)),
    "size_N": (np.int64, ("N",)),
    "notes": (np.uint8, ("bytes",)),
    "width_N": (np.int32, ("N",)),
    "height_N": (np.int32, ("N",)),
    "sha256_S": (np.uint8, ("S", 32)),
}
"""dtype and shape of every array for N images in S shards; the last four are optional."""
REQUIRED = tuple(ARRAYS)[:-4]


def fault_of(tables: Tables) -> str:
    """The first reason why arrays are not a valid index, "" if they are."""
    if missing := [name for name in REQUIRED if name not in tables]:
        return f"{missing[0]} is missing"
    blocks = {name: tables[name] for name in ("shards", "names", "classes")}
    sizes = {"N": _strings(blocks["names"]), "S": tables["bytes_S"].size}
    for name, array in tables.items():
        dtype, axes = ARRAYS[name]
        if "bytes" in axes and array.ndim == 1 and array.size and array[-1]:
            return f"{name} is cut off"
        shape = array.shape if "bytes" in axes else tuple(sizes.get(str(x), x) for x in axes)
        if array.dtype != dtype or array.shape != shape or array.ndim != len(axes):
            return f"{name} is {array.dtype} of shape {list(array.shape)}"
    shards, classes = _strings(blocks["shards"]), _strings(blocks["classes"])
    if shards != sizes["S"] or classes > sizes["N"] + SPARE:
        return f"it has {shards} shards with {sizes['S']} sizes and {classes} classes"
    names = list(StringTable.cut(blocks["shards"].tobytes()))
    if len(set(names)) != shards or any("/" in x or x in ("", ".", "..") for x in names):
        return "the name of a shard is repeated, or is not a file name"
    return _wrong_location(tables, classes)


def _strings(block: NDArray[Any]) -> int:
    """The number of strings in a block, each followed by a zero byte."""
    return int(np.count_nonzero(block == 0))


def _wrong_location(tables: Tables, classes: int) -> str:
    """The first reason why images cannot lie where the arrays say, "" if they can."""
    bytes_S, shard_N, label_N = (tables[name] for name in ("bytes_S", "shard_N", "label_N"))
    offset_N, size_N = tables["offset_N"], tables["size_N"]
    if not len(shard_N):
        return ""
    if shard_N.min() < 0 or shard_N.max() >= len(bytes_S) or (np.diff(shard_N) < 0).any():
        return f"shard_N is not ascending from 0 to {len(bytes_S) - 1}"
    if label_N.min() < -1 or label_N.max() >= classes:
        return f"label_N is outside of -1 to {classes - 1}"
    beyond_N = (bytes_S < 0)[shard_N] | (size_N < 0) | (offset_N < BLOCK)
    beyond_N |= offset_N > bytes_S[shard_N] - size_N
    if beyond_N.any():
        return f"image {int(beyond_N.argmax())} lies outside of its shard"
    overlaps_N = (offset_N[1:] < (offset_N + size_N)[:-1]) & (shard_N[1:] == shard_N[:-1])
    if overlaps_N.any():
        return f"image {int(overlaps_N.argmax()) + 1} overlaps the image before it"
    return ""
