"""The index of tar shards: for each image its shard, place and class, in one `.npz`.

It is built once from the tar headers, and compared with itself and with the shards at every start:
one that does not fit is refused, since it would fail, or show other images, at a later step.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unic_ds.config.data_spec import exists
from unic_ds.data.labels import CLASSES, classified
from unic_ds.data.members import Member, members_of, merged
from unic_ds.data.string_table import StringTable
from unic_ds.data.tar_headers import BLOCK
from unic_ds.files import open_atomic, open_regular
from unic_ds.files.printable import printable
from unic_ds.process import console

FORMAT = 1
HEAD = 65536
"""Bytes of a shard that are compared if its time stamp has changed."""
SLACK = 4 << 20
"""Bytes of an index beyond those of shards and classes.txt: an image takes less than its header."""
SPARE = 1 << 20
"""Classes beyond one an image, which classes.txt may list."""
NOTES = 20
"""Notes that are kept."""
REMEDY = "delete it, it is built again"

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
"""dtype and shape of every array; the last four need not be there."""
REQUIRED = tuple(ARRAYS)[:-4]


class Stamp(NamedTuple):
    """A shard's file as it was when its index was built."""

    size: int
    mtime_ns: int
    head: bytes  # sha256 of its first bytes


def build(tars: Sequence[Path], known: Sequence[str]) -> Tables:
    """The index of shards, read from their headers; `known` are the names of classes 0, 1, ..."""
    with ThreadPoolExecutor(8, thread_name_prefix="unic_ds-index") as pool:
        console.say(f"building the index of {len(tars)} shards, once")
        parts = console.track(pool.map(members_of, tars), len(tars), "index of the shards")
        members, left_out = merged(parts)
    stamps = [stamp_of(tar) for tar in tars]
    classes, label_N, notes = classified([m for part in members for m in part], known)
    shards = [tar.name for tar in tars]
    tables = tables_of(shards, members, stamps, classes=classes, label_N=label_N)
    return tables | {"notes": _block([*left_out.notes(), *notes][:NOTES])}


def tables_of(
    shards: Sequence[str],
    members: Sequence[Sequence[Member]],
    stamps: Sequence[Stamp],
    *,
    classes: Sequence[str],
    label_N: ArrayLike,
) -> Tables:
    """The arrays of an index file."""
    flat = [member for part in members for member in part]
    return {
        "format": np.array(FORMAT, dtype=np.int64),
        "shards": _block(shards),
        "bytes_S": np.array([stamp.size for stamp in stamps], dtype=np.int64),
        "mtime_S": np.array([stamp.mtime_ns for stamp in stamps], dtype=np.int64),
        "head_S": np.frombuffer(b"".join(s.head for s in stamps), np.uint8).reshape(-1, 32),
        "names": _block([member.name for member in flat]),
        "classes": _block(classes),
        "label_N": np.array(label_N, dtype=np.int32),
        "shard_N": np.repeat(np.arange(len(members), dtype=np.int32), [len(m) for m in members]),
        "offset_N": np.array([member.offset for member in flat], dtype=np.int64),
        "size_N": np.array([member.size for member in flat], dtype=np.int64),
    }


def _block(names: Iterable[str]) -> NDArray[np.uint8]:
    return np.frombuffer(StringTable.of(names).joined(), dtype=np.uint8)


def stamp_of(tar: Path) -> Stamp:
    """The stamp of a shard; OSError if it cannot be read."""
    stat = tar.stat()
    return Stamp(stat.st_size, stat.st_mtime_ns, head_of(tar))


def _stat(tar: Path) -> os.stat_result:
    try:
        return tar.stat()
    except OSError as error:
        raise ValueError(f"shard {str(tar)!r} cannot be read ({error.strerror})") from error


def head_of(tar: Path) -> bytes:
    """sha256 of a shard's first bytes."""
    with open_regular(tar) as file:
        return hashlib.sha256(file.read(HEAD)).digest()


def keep(tables: Tables, beside: Path, away: Path) -> Path:
    """Write an index beside its shards, or in the cache folder if that may not be written.

    ValueError if neither may.
    """
    try:
        return write(tables, beside)
    except OSError as error:
        refused = error.strerror
    try:
        away.parent.mkdir(parents=True, exist_ok=True)
        write(tables, away)
    except OSError as error:
        raise ValueError(
            f"the index of the shards can be written neither to {str(beside)!r} ({refused}) nor to"
            f" {str(away.parent)!r} ({error.strerror}); set UNIC_DS_CACHE to a folder that may be"
            " written"
        ) from error
    console.say(
        f"{printable(beside)} cannot be written ({refused}): the index is in {printable(away)}"
    )
    return away


def write(tables: Tables, file: Path) -> Path:
    """Write an index so that a reader sees all of it or none."""
    with open_atomic(file) as out:
        np.savez(out, **tables)  # type: ignore[arg-type]  # allow_pickle is unknown to NumPy 1.26
    return file


def load(file: Path, tars: Sequence[Path]) -> Tables:
    """The arrays of an index of `tars`; ValueError if it is damaged or of another version.

    Nothing is read beyond the size that such shards can need.
    """
    listed = [path for path in {tar.with_name(CLASSES) for tar in tars} if exists(path)]
    limit = SLACK + sum(_stat(path).st_size for path in (*tars, *listed))
    try:
        tables = _arrays(file, limit)
        version = int(tables["format"])
    except Exception as error:  # on hostile bytes zipfile and numpy raise ValueError, KeyError, ...
        raise ValueError(
            f"index {str(file)!r} is damaged ({printable(error)}); {REMEDY}"
        ) from error
    if version != FORMAT:
        raise ValueError(f"index {str(file)!r} is of format {version}; {REMEDY}")
    if fault := fault_of(tables):
        raise ValueError(f"index {str(file)!r} does not fit its shards: {fault}; {REMEDY}")
    return tables


def _arrays(file: Path, limit: int) -> Tables:
    """The arrays of an `.npz` that is not compressed, as `np.savez` writes it."""
    with open_regular(file) as data:
        size = os.fstat(data.fileno()).st_size
        if size > limit:
            raise ValueError(f"its {size} bytes are more than its shards need")
        with zipfile.ZipFile(data) as stored:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in stored.infolist()}
            strange = sorted(entries.keys() - ARRAYS.keys())
            if strange or len(entries) < len(stored.infolist()):
                raise ValueError(f"array {strange[0]!r} is unknown" if strange else "a name twice")
            if any(e.compress_type or e.file_size != e.compress_size for e in entries.values()):
                raise ValueError("it is compressed")
            return {name: _array(stored.read(entry)) for name, entry in entries.items()}


def _array(data: bytes) -> NDArray[Any]:
    """An array from the bytes of its `.npy`; ValueError if its header announces another size."""
    stream = BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array is of another version of NumPy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    size = dtype.itemsize
    for length in shape:
        size *= length
    if dtype.hasobject or size != len(data) - stream.tell():
        raise ValueError(f"an array announces {size} bytes of {len(data) - stream.tell()}")
    stream.seek(0)
    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def notes_of(tables: Tables) -> list[str]:
    """Notes on the shards, printed at every start."""
    block = tables.get("notes", np.empty(0, np.uint8))[: NOTES << 10]
    return list(islice(StringTable.cut(block.tobytes()), NOTES))


def fault_of(tables: Tables) -> str:
    """The first reason why arrays cannot be an index, "" if they can."""
    if missing := [name for name in REQUIRED if name not in tables]:
        return f"{missing[0]} is missing"
    blocks = {name: tables[name] for name in ("shards", "names", "classes")}
    sizes = {"N": _entries(blocks["names"]), "S": tables["bytes_S"].size}
    for name, array in tables.items():
        dtype, axes = ARRAYS[name]
        if "bytes" in axes and array.ndim == 1 and array.size and array[-1]:
            return f"{name} is cut off"
        shape = array.shape if "bytes" in axes else tuple(sizes.get(str(x), x) for x in axes)
        if array.dtype != dtype or array.shape != shape or array.ndim != len(axes):
            return f"{name} is {array.dtype} of shape {list(array.shape)}"
    shards, classes = _entries(blocks["shards"]), _entries(blocks["classes"])
    if shards != sizes["S"] or classes > sizes["N"] + SPARE:
        return f"there are {shards} shards of {sizes['S']} sizes and {classes} classes"
    names = list(StringTable.cut(blocks["shards"].tobytes()))
    if len(set(names)) != shards or any("/" in x or x in ("", ".", "..") for x in names):
        return "the name of a shard is there twice, or is none of a file"
    return _wrong_place(tables, classes)


def _entries(block: NDArray[Any]) -> int:
    """The number of strings in a block, each followed by a zero byte."""
    return int(np.count_nonzero(block == 0))


def _wrong_place(tables: Tables, classes: int) -> str:
    """The first reason why images cannot lie as the arrays say, "" if they can."""
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
        return f"image {int(overlaps_N.argmax()) + 1} lies before the end of the one before it"
    return ""


def compare(tables: Tables, folder: Path, tars: Sequence[Path], *, file: Path) -> None:
    """ValueError that names the first shard which is not as its index has it."""
    known = {name: s for s, name in enumerate(StringTable.cut(tables["shards"].tobytes()))}
    remedy = f"; delete {str(file)!r} if the shards are as they should be, it is built again"
    there = {tar.name: tar for tar in tars}
    for name in sorted(known.keys() - there.keys()):
        shown = printable(name)
        raise ValueError(f"shard '{shown}' is missing from {str(folder)!r}{remedy}")
    for name in sorted(there.keys() - known.keys()):
        raise ValueError(f"shard {name!r} is not in the index of its folder{remedy}")
    for name, s in known.items():
        stat = _stat(there[name])
        if stat.st_size != tables["bytes_S"][s]:
            was = f"{stat.st_size} bytes, {tables['bytes_S'][s]} when its index was built"
            raise ValueError(f"shard {name!r} has {was}{remedy}")
        touched = stat.st_mtime_ns != tables["mtime_S"][s]
        if touched and head_of(there[name]) != tables["head_S"][s].tobytes():
            raise ValueError(f"shard {name!r} has changed since its index was built{remedy}")
