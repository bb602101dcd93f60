"""The index of tar shards: the shard, offset and class of each image, in one `.npz`.

It is built once from the tar headers and checked at every start: an index that does not fit its
shards is refused, since it would fail, or show other images, at a later step.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unic_ds.config.data_spec import exists
from unic_ds.data.index_format import ARRAYS, FORMAT, Tables, fault_of
from unic_ds.data.labels import CLASSES, classified
from unic_ds.data.members import Member, members_of, merged
from unic_ds.data.string_table import StringTable
from unic_ds.files import open_atomic, open_regular
from unic_ds.files.printable import printable
from unic_ds.process import console

HEAD = 65536
"""Bytes of a shard that are compared if its modification time has changed."""
SLACK = 4 << 20
"""Bytes by which an index may exceed its shards and classes.txt: a row is below a tar header."""
MANY = 64
"""Shards whose headers take more than a moment to read."""
NOTES = 20
"""Notes that an index keeps."""
REMEDY = "delete it to have it built again"


class Stamp(NamedTuple):
    """Properties of a shard's file when its index was built."""

    size: int
    mtime_ns: int
    head: bytes  # SHA-256 of its first bytes


def build(tars: Sequence[Path], known: Sequence[str]) -> Tables:
    """Build the index of shards from their headers; `known` has the names of classes 0, 1, ..."""
    with ThreadPoolExecutor(8, thread_name_prefix="unic_ds-index") as pool:
        if len(tars) > MANY:
            console.say(f"building the index of {len(tars)} shards, once")
        parts = console.track(pool.map(members_of, tars), len(tars), "index of the shards")
        members, skipped = merged(parts)
    stamps = [stamp_of(tar) for tar in tars]
    classes, label_N, notes = classified([m for part in members for m in part], known)
    shards = [tar.name for tar in tars]
    tables = tables_of(shards, members, stamps, classes=classes, label_N=label_N)
    return tables | {"notes": _block([*skipped.notes(), *notes][:NOTES])}


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
    """SHA-256 of a shard's first bytes."""
    with open_regular(tar) as file:
        return hashlib.sha256(file.read(HEAD)).digest()


def save(tables: Tables, near: Path, cached: Path) -> Path:
    """Write an index to `near`, next to its shards, or to `cached` if that fails.

    Returns the path. ValueError if neither can be written.
    """
    try:
        return write(tables, near)
    except OSError as error:
        reason = error.strerror
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write(tables, cached)
    except OSError as error:
        raise ValueError(
            f"the index of the shards can be written neither to {str(near)!r} ({reason}) nor to"
            f" {str(cached.parent)!r} ({error.strerror}); set UNIC_DS_CACHE to a folder that is"
            " writable"
        ) from error
    console.say(
        f"{printable(near)} cannot be written ({reason}): the index is in {printable(cached)}"
    )
    return cached


def write(tables: Tables, file: Path) -> Path:
    """Write an index atomically."""
    with open_atomic(file) as out:
        np.savez(out, **tables)  # type: ignore[arg-type]  # allow_pickle is unknown to NumPy 1.26
    return file


def load(file: Path, tars: Sequence[Path]) -> Tables:
    """Read the index of `tars`; ValueError if it is damaged or has another format.

    A file that is larger than such shards can need is not read.
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
        raise ValueError(f"index {str(file)!r} has format {version}, not {FORMAT}; {REMEDY}")
    if fault := fault_of(tables):
        raise ValueError(f"index {str(file)!r} does not fit its shards: {fault}; {REMEDY}")
    return tables


def _arrays(file: Path, limit: int) -> Tables:
    """The arrays of an `.npz` without compression, as `np.savez` writes it."""
    with open_regular(file) as data:
        size = os.fstat(data.fileno()).st_size
        if size > limit:
            raise ValueError(f"its {size} bytes are more than its shards need")
        with zipfile.ZipFile(data) as stored:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in stored.infolist()}
            unknown = sorted(entries.keys() - ARRAYS.keys())
            if unknown or len(entries) < len(stored.infolist()):
                raise ValueError(
                    f"array {unknown[0]!r} is unknown" if unknown else "a name is repeated"
                )
            if any(e.compress_type or e.file_size != e.compress_size for e in entries.values()):
                raise ValueError("it is compressed")
            return {name: _array(stored.read(entry)) for name, entry in entries.items()}


def _array(data: bytes) -> NDArray[Any]:
    """An array from the bytes of its `.npy`; ValueError if its header announces another size."""
    stream = BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array has another version of NumPy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    size = dtype.itemsize
    for length in shape:
        size *= length
    if dtype.hasobject or size != len(data) - stream.tell():
        raise ValueError(f"an array announces {size} bytes of {len(data) - stream.tell()}")
    stream.seek(0)
    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def notes_of(tables: Tables) -> list[str]:
    """Notes about the shards, which are printed at every start."""
    block = tables.get("notes", np.empty(0, np.uint8))[: NOTES << 10]
    return list(islice(StringTable.cut(block.tobytes()), NOTES))


def compare(tables: Tables, folder: Path, tars: Sequence[Path], *, file: Path) -> None:
    """Raise ValueError with the name of the first shard that differs from its index."""
    known = {name: s for s, name in enumerate(StringTable.cut(tables["shards"].tobytes()))}
    remedy = f"; if the shards are right, delete {str(file)!r} to have it built again"
    found = {tar.name: tar for tar in tars}
    for name in sorted(known.keys() - found.keys()):
        shown = printable(name)
        raise ValueError(f"shard '{shown}' is missing from {str(folder)!r}{remedy}")
    for name in sorted(found.keys() - known.keys()):
        raise ValueError(f"shard {name!r} is not in the index of its folder{remedy}")
    for name, s in known.items():
        stat = _stat(found[name])
        if stat.st_size != tables["bytes_S"][s]:
            sizes = f"{stat.st_size} bytes, and had {tables['bytes_S'][s]} when its index was built"
            raise ValueError(f"shard {name!r} has {sizes}{remedy}")
        touched = stat.st_mtime_ns != tables["mtime_S"][s]
        if touched and head_of(found[name]) != tables["head_S"][s].tobytes():
            raise ValueError(f"shard {name!r} has changed since its index was built{remedy}")
