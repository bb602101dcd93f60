"""A source written as tar shards with their index: `unic-ds pack`.

The images are shuffled once and cut into chunks; other processes read, decode and, where asked,
shrink a chunk; this one writes what comes back, in order. A shard ends where a chunk ends, so how
far a pack has come is the number of a chunk, and one that was killed goes on after its last whole
shard, to the same bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unic_ds import dist
from unic_ds.config import Data
from unic_ds.data import order, shard_index, shards
from unic_ds.data.image_files import is_hidden
from unic_ds.data.labels import CLASSES
from unic_ds.data.members import Member
from unic_ds.data.pack_records import Record, read_object, read_record
from unic_ds.data.reader import measure, opened
from unic_ds.data.shards import INDEX, MissingShard
from unic_ds.data.source import FLAT, Source
from unic_ds.data.torch_decoder import rgb, upright
from unic_ds.files import sha256, write_atomic
from unic_ds.files.printable import printable
from unic_ds.process import console

FORMAT = 1
MANIFEST, PARTIAL, BROKEN = "pack.json", "partial", "broken.txt"
CHUNK = 16  # images that a process takes at a time
AHEAD = 3  # chunks in work per process
QUALITY = 95  # of a JPEG that is made anew
LONGEST = 1 << 16  # characters of a name in broken.txt and classes.txt
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a source is packed."""

    shard_mb: float = 512
    max_side: int = 0  # pixels; 0: images stay as they are
    seed: int = 0


class Packed(NamedTuple):
    """An image as it goes into a shard; width and height are of the upright image."""

    ending: str
    data: bytes
    width: int
    height: int


def pack(source: Source, out: Path, settings: Settings, *, workers: int = 0) -> str:
    """Write `source` to `out`, or go on where that was left; a sentence about the whole.

    ValueError where `out` holds something else.
    """
    manifest = {"format": FORMAT, "images": len(source), "source": source.fingerprint()}
    _begin(out, manifest | asdict(settings))
    if not (out / INDEX).exists():
        records = _records(out, len(source))
        try:
            at, number = records[-1].end if records else 0, len(records)
            workers = workers or dist.cores()
            records += _packed(source, out, settings, at=at, number=number, workers=workers)
        except OSError as error:
            raise RuntimeError(
                f"shards cannot be written to {str(out)!r} ({error.strerror or error}); the same"
                " command goes on where it was"
            ) from error
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a packing process was killed, out of memory perhaps; the same command goes on"
                " where it was, fewer --workers need less"
            ) from error
        _finish(source, out, records)
    return _summary(out)


def packed(encoded: NDArray[np.uint8], max_side: int) -> Packed:
    """An image ready to be packed, decoded once; ValueError says what is wrong with it.

    Its bytes stay unless it has transparency, which goes on white, or a side above `max_side`.
    """
    data = encoded.tobytes()
    width, height = measure(encoded, Data().max_megapixels)
    try:
        with opened(data) as image:
            image.load()
            ending = ENDINGS[str(image.format)]
            clear, large = image.has_transparency_data, 0 < max_side < max(width, height)
            if not clear and not large:
                return Packed(ending, data, width, height)
            made = _on_white(upright(image)) if clear else rgb(upright(image))
    except Exception as error:  # on hostile bytes PIL raises SyntaxError, OSError, KeyError, ...
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot be decoded ({reason})") from error
    if large:
        made.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if ending in ("jpg", "webp"):
        made.save(file, "JPEG", quality=QUALITY, subsampling=0)
    else:
        made.save(file, "PNG")
    kind = "jpg" if ending in ("jpg", "webp") else "png"
    return Packed(kind, file.getvalue(), made.width, made.height)


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def keys(names: Iterable[str]) -> Iterator[str]:
    """A key for each sample: its path without what a tar or WebDataset would misread, unique."""
    used: set[str] = set()
    for name in names:
        folder, _, last = name.rpartition("/")
        parts = [part for part in folder.split("/") if part not in ("", ".", "..")]
        parts = [f"_{part}" if is_hidden(part) else part for part in parts]
        stem = last.rpartition(".")[0].replace(".", "_") or "_"
        plain = key = "/".join([*parts, stem])
        again = 1
        while key in used:
            again += 1
            key = f"{plain}~{again}"
        used.add(key)
        yield key


def _begin(out: Path, manifest: dict[str, object]) -> None:
    """Make `out` and its manifest; ValueError where it holds another pack, or no pack."""
    file = out / MANIFEST
    if file.exists():
        was = read_object(file, f"name a new folder instead of {str(out)!r}")
        other = [key for key, value in manifest.items() if was.get(key) != value]
        if other:
            key = other[0]
            raise ValueError(
                f"{str(out)!r} is a pack with {key} {was.get(key)!r}, not {manifest[key]!r}; name a"
                " new folder, or pack with the same source and settings"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} is there and no pack; name a new folder")
    (out / PARTIAL).mkdir(parents=True)
    _write(file, json.dumps(manifest, indent=2) + "\n")


def _records(out: Path, images: int) -> list[Record]:
    """The records of complete shards of a source of `images`; ValueError for a damaged one."""
    records: list[Record] = []
    while (file := out / PARTIAL / f"{_name(len(records))}.json").exists():
        begin = records[-1].end if records else 0
        record = read_record(file, images=images, chunk=CHUNK, begin=begin)
        tar = out / _name(len(records))
        if record.members and not (tar.exists() and tar.stat().st_size == record.bytes):
            break
        records.append(record)
    return records


def _packed(
    source: Source, out: Path, settings: Settings, *, at: int, number: int, workers: int
) -> Iterator[Record]:
    """Write the shards from `number` on, which begin with chunk `at`."""
    words_N = order.words(settings.seed, "pack", 0, len(source))
    shuffled_N = np.argsort(words_N, kind="stable")
    chunks = [np.sort(part) for part in np.split(shuffled_N, range(CHUNK, len(source), CHUNK))]
    key_N = list(keys(source.names))
    with closing(_decoded(source, chunks[at:], settings.max_side, workers)) as results:
        images = console.track(results, len(chunks) - at, "packing")
        while at < len(chunks):
            shard = _Shard(out, number)
            while at < len(chunks) and shard.size < settings.shard_mb * 1e6:
                for index, image in zip(chunks[at].tolist(), next(images), strict=True):
                    shard.add(source.names[index], key_N[index], int(source.label_N[index]), image)
                at += 1
            yield shard.close(at)
            console.say(f"{shard.name}: {min(at * CHUNK, len(source))} of {len(source)} images")
            number += 1


def _decoded(
    source: Source, chunks: list[NDArray[np.int64]], max_side: int, workers: int
) -> Generator[list[Packed | str], None, None]:
    """The images of each chunk in turn, or why they are left out."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    flight: deque[Future[list[Packed | str]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            for chunk in chunks:
                part = replace(source.subset(chunk), classes=())
                flight.append(pool.submit(_chunk, part, max_side))
                if len(flight) >= AHEAD * workers:
                    yield flight.popleft().result()
            while flight:
                yield flight.popleft().result()
        except MissingShard as error:  # from another process; here, so that it reads as ours
            raise MissingShard(str(error)) from error
        finally:
            for future in flight:
                future.cancel()


def _chunk(source: Source, max_side: int) -> list[Packed | str]:
    """All images of a small source, in another process."""
    return [_image(source, index, max_side) for index in range(len(source))]


def _image(source: Source, index: int, max_side: int) -> Packed | str:
    try:
        return packed(source.read(index), max_side)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        return str(error)


class _Shard:
    """A shard that is being written, out of sight until it is whole."""

    def __init__(self, out: Path, number: int):
        self.name, self._out = _name(number), out
        self._part = out / PARTIAL / self.name
        self._tar = tarfile.TarFile(self._part, "w", format=tarfile.GNU_FORMAT)
        self._members: list[tuple[str, int, int, int, int, int]] = []
        self._broken: list[tuple[str, str]] = []

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._tar.offset

    def add(self, source_name: str, key: str, label: int, image: Packed | str) -> None:
        """A sample, or why it is left out."""
        if isinstance(image, str):
            self._broken.append((source_name, image))
            return
        name = f"{key}.{image.ending}"
        offset = self._put(name, image.data)
        if label != FLAT:
            self._put(f"{key}.cls", str(label).encode())
        self._members.append((name, offset, len(image.data), label, image.width, image.height))

    def close(self, end: int) -> Record:
        """Put the shard in its place, its record beside those of the others."""
        self._tar.close()
        size = self._part.stat().st_size
        record = Record(end, size, sha256(self._part), self._members, self._broken)
        _write(self._part.with_name(f"{self.name}.json"), json.dumps(asdict(record)))
        if self._members:
            self._part.replace(self._out / self.name)
        return record

    def _put(self, name: str, data: bytes) -> int:
        """Add a member; where its data begins."""
        info = tarfile.TarInfo(name)  # owner, time and mode are always the same
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _finish(source: Source, out: Path, records: list[Record]) -> None:
    """Write classes, list and index; the index last, for it says that all is there."""
    whole = {_name(n): record for n, record in enumerate(records) if record.members}
    broken = sorted((name, reason) for record in records for name, reason in record.broken)
    if not whole:
        name, reason = broken[0]
        raise ValueError(
            f"none of {len(source)} images can be packed: '{printable(name)}' {printable(reason)}"
        )
    lines = (f"{printable(name, LONGEST)}\t{printable(reason)}\n" for name, reason in broken)
    _write(out / BROKEN, "".join(lines))
    if source.classes:
        _write(out / CLASSES, "".join(f"{_line(name)}\n" for name in source.classes))
    members = [[Member(*m[:3], "") for m in record.members] for record in whole.values()]
    stamps = [shard_index.stamp_of(out / name) for name in whole]
    rows_N3 = np.array([m[3:] for r in whole.values() for m in r.members], np.int32)
    digests = b"".join(bytes.fromhex(record.sha256) for record in whole.values())
    tables = shard_index.tables_of(
        list(whole), members, stamps, classes=source.classes, label_N=rows_N3[:, 0]
    ) | {
        "width_N": rows_N3[:, 1],
        "height_N": rows_N3[:, 2],
        "sha256_S": np.frombuffer(digests, np.uint8).reshape(-1, 32),
    }
    if fault := shard_index.fault_of(tables):
        raise ValueError(
            f"the records in {str(out / PARTIAL)!r} do not fit their shards: {fault}; delete them,"
            " the shards are packed again"
        )
    shard_index.write(tables, out / INDEX)


def _line(name: str) -> str:
    """A class's name on a line of its own."""
    return printable(name, LONGEST) if {"\n", "\r"} & set(name) else name


def _summary(out: Path) -> str:
    """What lies in a finished pack; what only served the work is deleted."""
    if (out / PARTIAL).exists():
        for file in (out / PARTIAL).iterdir():
            file.unlink()
        (out / PARTIAL).rmdir()
    tables = shard_index.load(out / INDEX, shards.found_in(out))
    broken = (out / BROKEN).read_text("utf-8", "surrogateescape").count("\n")
    left_out = f"; {broken} left out, listed in {out / BROKEN}" if broken else ""
    images, size = len(tables["offset_N"]), int(tables["bytes_S"].sum())
    count = f"{images} images in {len(tables['bytes_S'])} shards"
    return f"{out}: {count}, {size / 1e6:.1f} MB{left_out}"


def _name(number: int) -> str:
    return f"{number:06d}.tar"


def _write(file: Path, text: str) -> None:
    """A text file in one piece."""
    write_atomic(file, text, "surrogateescape")
