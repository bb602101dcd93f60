"""Samples in tar shards of the WebDataset layout, read in place.

`0001.jpg 0001.cls` are one sample: an image and its class. An index of where each image lies is
built once from the tar headers, kept beside the shards, and checked against them at every start.
Nothing is ever unpacked: a member's name is only a name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unic_ds.data.files import SUFFIXES, first_folder
from unic_ds.data.names import Names
from unic_ds.data.order import Run, Runs
from unic_ds.data.source import FLAT, MAX_MB, Source, refuse_large
from unic_ds.files import replacing
from unic_ds.home import home

FORMAT = 1
INDEX = "unic_ds-index.npz"
CLASSES = "classes.txt"
HEAD = 65536  # bytes of a shard that are compared where its time stamp has changed
OPEN = 256  # shards held open
log = logging.getLogger("unic_ds.data")


class MissingShard(RuntimeError):
    """A shard that was there at the start is gone: not a fault of single samples."""


class Member(NamedTuple):
    """An image in a shard."""

    name: str
    offset: int
    size: int
    label: str  # text of its class; empty: none


class Stamp(NamedTuple):
    """What is remembered of a shard's file."""

    size: int
    mtime_ns: int
    head: bytes  # sha256 of its first bytes


class _Descriptor:
    """A file open for reading, closed when its last reader lets go of it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class OpenFiles:
    """Files held open for reading, at most `limit`; one that is in use closes after that."""

    def __init__(self, limit: int = OPEN):
        self._limit, self._lock = limit, threading.Lock()
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int]]:
        return OpenFiles, (self._limit,)  # another process opens its own

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Bytes of a file, fewer at its end; OSError where it cannot be read."""
        with self._lock:
            file = self._open.pop(path, None) or _Descriptor(path)
            self._open[path] = file
            if len(self._open) > self._limit:
                self._open.popitem(last=False)  # closed when nobody reads from it any more
        parts = []
        while size and (part := os.pread(file.number, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)


@dataclass(frozen=True, eq=False)
class Shards(Source):
    """Images in tar files; a sample's name is its member's path."""

    shards: tuple[str, ...] = ()
    shard_N: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    offset_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    size_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    files: OpenFiles = field(default_factory=OpenFiles)

    def read(self, index: int, max_mb: float = MAX_MB) -> NDArray[np.uint8]:
        """A sample's bytes, still encoded; MissingShard where the shard is gone.

        ValueError for more than `max_mb` MB, before anything is read.
        """
        refuse_large(int(self.size_N[index]), max_mb)
        path = self.folder / self.shards[self.shard_N[index]]
        try:
            data = self.files.read(path, int(self.offset_N[index]), int(self.size_N[index]))
        except FileNotFoundError as error:
            raise MissingShard(
                f"shard {str(path)!r} is gone since the start; bring it back and resume"
            ) from error
        return np.frombuffer(data, dtype=np.uint8)

    def runs(self, window: int) -> Runs:
        """Two levels: shards, then the samples of `window` shards."""
        counts_S = np.bincount(self.shard_N, minlength=len(self.shards))
        return (Run(len(self), tuple(counts_S[counts_S > 0].tolist()), window),)

    def fingerprint(self) -> str:
        """Over names and which shard has how many, which the order depends on."""
        digest = hashlib.sha256(self.names.joined())
        digest.update(np.bincount(self.shard_N, minlength=len(self.shards)).tobytes())
        return digest.hexdigest()

    def subset(self, index_M: ArrayLike) -> Self:
        """The samples at those ascending places, with the same classes."""
        chosen_M = np.asarray(index_M, dtype=np.int64)
        fewer = super().subset(chosen_M)
        where = {k: getattr(self, k)[chosen_M] for k in ("shard_N", "offset_N", "size_N")}
        return replace(fewer, **where)


def found_in(folder: Path) -> list[Path]:
    """The tar files of a folder, by name; ValueError where they are compressed."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    tars = [folder / name for name in names if name.endswith(".tar")]
    zipped = [name for name in names if name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz"))]
    if zipped and not tars:
        raise ValueError(
            f"{str(folder / zipped[0])!r} is compressed: its images cannot be read in place; unpack"
            " it to .tar"
        )
    return tars


def of_shards(where: Path, tars: Sequence[Path]) -> Shards:
    """The samples of tar shards, by their index; it is built where there is none.

    ValueError where the index does not fit the shards, or no image is in them.
    """
    folder = where if where.is_dir() else where.parent
    beside = where / INDEX if where.is_dir() else where.with_suffix(".tar.index.npz")
    away = home() / "indexes" / f"{hashlib.sha256(os.fsencode(where.resolve())).hexdigest()}.npz"
    file = next((path for path in (beside, away) if path.exists()), None)
    if file is None:
        tables = build(tars, class_names(folder))
        file = keep(tables, beside, away)
    tables = load(file)
    compare(tables, folder, tars, file)
    if not len(tables["offset_N"]):
        raise ValueError(f"no {', '.join(SUFFIXES)} in the shards of {str(where)!r}")
    return Shards(
        folder,
        Names.cut(tables["names"].tobytes()),
        tuple(Names.cut(tables["classes"].tobytes())),
        tables["label_N"],
        tuple(Names.cut(tables["shards"].tobytes())),
        tables["shard_N"],
        tables["offset_N"],
        tables["size_N"],
    )


def class_names(folder: Path) -> list[str]:
    """Names of the classes that `.cls` members number, where `classes.txt` lists them."""
    file = folder / CLASSES
    text = file.read_text("utf-8", "surrogateescape") if file.exists() else ""
    return text.removesuffix("\n").split("\n") if text else []


def build(tars: Sequence[Path], known: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The index of shards, read from their headers."""
    from unic_ds.log import track

    with ThreadPoolExecutor(8, thread_name_prefix="unic_ds-index") as pool:
        log.info("an index of %d shards is built, once", len(tars))
        members = list(track(pool.map(members_of, tars), len(tars), "index of the shards"))
    stamps = [stamp_of(tar) for tar in tars]
    return tables_of([tar.name for tar in tars], members, stamps, known)


def tables_of(
    shards: Sequence[str],
    members: Sequence[Sequence[Member]],
    stamps: Sequence[Stamp],
    known: Sequence[str],
) -> dict[str, NDArray[Any]]:
    """The arrays of an index file; `known` are the names of classes 0, 1, ..."""
    flat = [member for part in members for member in part]
    numbered = all(member.label.isdigit() for member in flat if member.label)
    labels = [_named(member, known if numbered else ()) for member in flat]
    key = int if numbered and not known else str
    classes = list(known) if numbered and known else sorted({x for x in labels if x}, key=key)
    place = {name: i for i, name in enumerate(classes)} | {"": FLAT}
    return {
        "format": np.array(FORMAT),
        "shards": _block(shards),
        "bytes_S": np.array([stamp.size for stamp in stamps], dtype=np.int64),
        "mtime_S": np.array([stamp.mtime_ns for stamp in stamps], dtype=np.int64),
        "head_S": np.frombuffer(b"".join(s.head for s in stamps), np.uint8).reshape(-1, 32),
        "names": _block([member.name for member in flat]),
        "classes": _block(classes),
        "label_N": np.array([place[label] for label in labels], dtype=np.int32),
        "shard_N": np.repeat(np.arange(len(members), dtype=np.int32), [len(m) for m in members]),
        "offset_N": np.array([member.offset for member in flat], dtype=np.int64),
        "size_N": np.array([member.size for member in flat], dtype=np.int64),
    }


def _named(member: Member, known: Sequence[str]) -> str:
    """The name of a member's class: by number, by text, or by folder."""
    if not member.label:
        return first_folder(member.name)
    if not known:
        return member.label
    number = int(member.label)
    if number >= len(known):
        raise ValueError(
            f"{member.name!r} has class {number}, but {CLASSES} names {len(known)}; complete it"
        )
    return known[number]


def _block(names: Iterable[str]) -> NDArray[np.uint8]:
    return np.frombuffer(Names.of(names).joined(), dtype=np.uint8)


def members_of(tar: Path) -> list[Member]:
    """The images of a shard with their classes; ValueError where it is not a whole tar."""
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            return list(_samples(archive, partial(_text, file)))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"shard {str(tar)!r} is not a whole tar ({error}); make it anew"
        ) from error
    except OSError as error:
        raise ValueError(f"shard {str(tar)!r} cannot be read ({error.strerror})") from error


def _samples(archive: tarfile.TarFile, text: Callable[[tarfile.TarInfo], str]) -> Iterator[Member]:
    """Members that share a name up to the first dot of its last part, one image of each group."""
    key, image, label = "", None, ""
    for member in archive:
        if not member.isreg():
            continue
        folder, slash, last = member.name.rpartition("/")
        stem, _, ending = last.partition(".")
        if folder + slash + stem != key:
            if image:
                yield image._replace(label=label)
            key, image, label = folder + slash + stem, None, ""
        if f".{ending.lower()}".endswith(SUFFIXES) and image is None:
            image = Member(member.name, member.offset_data, member.size, "")
        elif ending == "cls":
            label = text(member)
    if image:
        yield image._replace(label=label)


def _text(file: BufferedReader, member: tarfile.TarInfo) -> str:
    """A small member's text."""
    return os.pread(file.fileno(), min(member.size, 1024), member.offset_data).decode().strip()


def stamp_of(tar: Path) -> Stamp:
    """What to know a shard by; OSError where it is not there."""
    stat = tar.stat()
    return Stamp(stat.st_size, stat.st_mtime_ns, head_of(tar))


def head_of(tar: Path) -> bytes:
    """sha256 of a shard's first bytes."""
    with tar.open("rb") as file:
        return hashlib.sha256(file.read(HEAD)).digest()


def keep(tables: dict[str, NDArray[Any]], beside: Path, away: Path) -> Path:
    """Write an index beside its shards, or in the cache folder where that may not be written."""
    try:
        return write(tables, beside)
    except OSError as error:
        away.parent.mkdir(parents=True, exist_ok=True)
        log.info("%s cannot be written (%s): the index lies in %s", beside, error.strerror, away)
        return write(tables, away)


def write(tables: dict[str, NDArray[Any]], file: Path) -> Path:
    """Write an index in one piece."""
    with replacing(file) as out:
        np.savez(out, allow_pickle=False, **tables)
    return file


def load(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an index; ValueError where it is damaged or of another version."""
    try:
        with file.open("rb") as data, np.load(data, allow_pickle=False) as stored:
            tables = {name: stored[name] for name in stored.files}
        version = int(tables["format"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"index {str(file)!r} is damaged ({error}); delete it, it is built again"
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"index {str(file)!r} is of format {version}; delete it, it is built again"
        )
    return tables


def compare(
    tables: dict[str, NDArray[Any]], folder: Path, tars: Sequence[Path], file: Path
) -> None:
    """ValueError that names the first shard which is not as its index has it."""
    known = {name: s for s, name in enumerate(Names.cut(tables["shards"].tobytes()))}
    remedy = f"; delete {str(file)!r} if the shards are as they should be, it is built again"
    there = {tar.name: tar for tar in tars}
    for name in sorted(known.keys() - there.keys()):
        raise ValueError(f"shard {name!r} is missing from {str(folder)!r}{remedy}")
    for name in sorted(there.keys() - known.keys()):
        raise ValueError(f"shard {name!r} is not in the index of its folder{remedy}")
    for name, s in known.items():
        stat = there[name].stat()
        if stat.st_size != tables["bytes_S"][s]:
            was = f"{stat.st_size} bytes, {tables['bytes_S'][s]} when its index was built"
            raise ValueError(f"shard {name!r} has {was}{remedy}")
        touched = stat.st_mtime_ns != tables["mtime_S"][s]
        if touched and head_of(there[name]) != tables["head_S"][s].tobytes():
            raise ValueError(f"shard {name!r} has changed since its index was built{remedy}")
