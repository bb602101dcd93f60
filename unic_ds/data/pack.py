"""Write a source as tar shards with their index: `unic-ds pack`.

The images are shuffled once and cut into chunks. Worker processes read, decode and optionally
shrink the images of a chunk; this process writes them in order. A shard ends at the end of a chunk,
so the progress of a pack is a number of chunks, and a pack that was killed continues after its last
complete shard, to the same bytes.
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
from unic_ds.data import index_format, order, shard_index, shards
from unic_ds.data.image_files import is_hidden
from unic_ds.data.labels import CLASSES
from unic_ds.data.members import Member
from unic_ds.data.pack_records import Record, read_object, read_record
from unic_ds.data.reader import measure, opened
from unic_ds.data.shards import INDEX, MissingShard
from unic_ds.data.source import NO_CLASS, Source
from unic_ds.data.torch_decoder import rgb, upright
from unic_ds.files import sha256, write_atomic
from unic_ds.files.printable import printable
from unic_ds.process import console

FORMAT = 1
MANIFEST, PARTIAL, BROKEN = "pack.json", "partial", "broken.txt"
CHUNK = 16  # images of a worker's task
AHEAD = 3  # chunks in flight per worker
QUALITY = 95  # of a JPEG that is encoded again
LONGEST = 1 << 16  # characters of a name in broken.txt and classes.txt
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of a pack."""

    shard_mb: float = 512
    max_side: int = 0  # pixels; 0: images keep their size
    seed: int = 0


class Packed(NamedTuple):
    """An image of a shard; width and height in pixels are of the upright image."""

    ending: str
    data: bytes
    width: int
    height: int


def pack(source: Source, out: Path, settings: Settings, *, workers: int = 0) -> str:
    """Write `source` to `out`, or continue an unfinished pack; returns a sentence for the user.

    ValueError if `out` has other contents.
    """
    manifest = {"format": FORMAT, "images": len(source), "source": source.fingerprint()}
    _begin(out, manifest | asdict(settings))
    if not (out / INDEX).exists():
        records = _records(out, len(source))
        try:
            at, number = records[-1].end if records else 0, len(records)
            workers = workers or dist.cores()
            records += _write_shards(source, out, settings, at=at, number=number, workers=workers)
        except OSError as error:
            raise RuntimeError(
                f"shards cannot be written to {str(out)!r} ({error.strerror or error}); run the"
                " same command again to continue"
            ) from error
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a packing process was killed, perhaps for lack of memory; run the same command"
                " again to continue, with fewer --workers to use less memory"
            ) from error
        _finish(source, out, records)
    return _summary(out)


def prepare_image(encoded: NDArray[np.uint8], max_side: int) -> Packed:
    """Decode an image once to check it, and shrink it if asked; ValueError if it is refused.

    Its bytes are kept unless it has transparency, which is put on white, or a side above
    `max_side`.
    """
    data = encoded.tobytes()
    width, height = measure(encoded, Data().max_megapixels)
    try:
        with opened(data) as image:
            image.load()
            ending = ENDINGS[str(image.format)]
            transparent = image.has_transparency_data
            large = 0 < max_side < max(width, height)
            if not transparent and not large:
                return Packed(ending, data, width, height)
            shown = _on_white(upright(image)) if transparent else rgb(upright(image))
    except Exception as error:  # on hostile bytes PIL raises SyntaxError, OSError, KeyError, ...
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot be decoded ({reason})") from error
    if large:
        shown.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if ending in ("jpg", "webp"):
        shown.save(file, "JPEG", quality=QUALITY, subsampling=0)
    else:
        shown.save(file, "PNG")
    kind = "jpg" if ending in ("jpg", "webp") else "png"
    return Packed(kind, file.getvalue(), shown.width, shown.height)


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def unique_keys(names: Iterable[str]) -> Iterator[str]:
    """A unique key for each sample: its path, without dots that WebDataset would misread."""
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
    """Create `out` and its manifest; ValueError if it has another pack or other files."""
    file = out / MANIFEST
    if file.exists():
        was = read_object(file, f"name a new folder instead of {str(out)!r}")
        other = [key for key, value in manifest.items() if was.get(key) != value]
        if other:
            key = other[0]
            raise ValueError(
                f"{str(out)!r} is a pack with {key} {was.get(key)!r}, not {manifest[key]!r}; name a"
                " new folder, or use the same source and settings"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is not a pack; name a new folder")
    (out / PARTIAL).mkdir(parents=True)
    _write(file, json.dumps(manifest, indent=2) + "\n")


def _records(out: Path, images: int) -> list[Record]:
    """Read the records of the complete shards; ValueError for a damaged one."""
    records: list[Record] = []
    while (file := out / PARTIAL / f"{_name(len(records))}.json").exists():
        begin = records[-1].end if records else 0
        record = read_record(file, images=images, chunk=CHUNK, begin=begin)
        tar = out / _name(len(records))
        if record.members and not (tar.exists() and tar.stat().st_size == record.bytes):
            break
        records.append(record)
    return records


def _write_shards(
    source: Source, out: Path, settings: Settings, *, at: int, number: int, workers: int
) -> Iterator[Record]:
    """Write the shards from `number` on, which begin with chunk `at`; yields their records."""
    sort_key_N = order.random_words(settings.seed, "pack", 0, len(source))
    shuffled_N = np.argsort(sort_key_N, kind="stable")
    chunks = [np.sort(part) for part in np.split(shuffled_N, range(CHUNK, len(source), CHUNK))]
    key_N = list(unique_keys(source.names))
    with closing(_prepare_chunks(source, chunks[at:], settings.max_side, workers)) as results:
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


def _prepare_chunks(
    source: Source, chunks: list[NDArray[np.int64]], max_side: int, workers: int
) -> Generator[list[Packed | str], None, None]:
    """The images of each chunk in turn; a broken image is the reason, as text."""
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
        except MissingShard as error:  # drops the traceback of the other process
            raise MissingShard(str(error)) from error
        finally:
            for future in flight:
                future.cancel()


def _chunk(source: Source, max_side: int) -> list[Packed | str]:
    """All images of a chunk, in a worker process."""
    return [_image(source, index, max_side) for index in range(len(source))]


def _image(source: Source, index: int, max_side: int) -> Packed | str:
    try:
        return prepare_image(source.read(index), max_side)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        return str(error)


class _Shard:
    """A shard that is being written to a temporary path until it is complete."""

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
        """Write a sample; a broken one is the reason, as text, and is listed."""
        if isinstance(image, str):
            self._broken.append((source_name, image))
            return
        name = f"{key}.{image.ending}"
        offset = self._put(name, image.data)
        if label != NO_CLASS:
            self._put(f"{key}.cls", str(label).encode())
        self._members.append((name, offset, len(image.data), label, image.width, image.height))

    def close(self, end: int) -> Record:
        """Finish the shard: write its record, then move it to its final path."""
        self._tar.close()
        size = self._part.stat().st_size
        record = Record(end, size, sha256(self._part), self._members, self._broken)
        _write(self._part.with_name(f"{self.name}.json"), json.dumps(asdict(record)))
        if self._members:
            self._part.replace(self._out / self.name)
        return record

    def _put(self, name: str, data: bytes) -> int:
        """Write a member; returns the offset of its data in bytes."""
        info = tarfile.TarInfo(name)  # owner, time and mode are always the same
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _finish(source: Source, out: Path, records: list[Record]) -> None:
    """Write classes, list of broken images and index; the index last: it marks a finished pack."""
    written = {_name(n): record for n, record in enumerate(records) if record.members}
    broken = sorted((name, reason) for record in records for name, reason in record.broken)
    if not written:
        name, reason = broken[0]
        raise ValueError(
            f"none of {len(source)} images can be packed: '{printable(name)}' {printable(reason)}"
        )
    lines = (f"{printable(name, LONGEST)}\t{printable(reason)}\n" for name, reason in broken)
    _write(out / BROKEN, "".join(lines))
    if source.classes:
        _write(out / CLASSES, "".join(f"{_line(name)}\n" for name in source.classes))
    members = [[Member(*m[:3], "") for m in record.members] for record in written.values()]
    stamps = [shard_index.stamp_of(out / name) for name in written]
    rows_N3 = np.array([m[3:] for r in written.values() for m in r.members], np.int32)
    digests = b"".join(bytes.fromhex(record.sha256) for record in written.values())
    tables = shard_index.tables_of(
        list(written), members, stamps, classes=source.classes, label_N=rows_N3[:, 0]
    ) | {
        "width_N": rows_N3[:, 1],
        "height_N": rows_N3[:, 2],
        "sha256_S": np.frombuffer(digests, np.uint8).reshape(-1, 32),
    }
    if fault := index_format.fault_of(tables):
        raise ValueError(
            f"the records in {str(out / PARTIAL)!r} do not fit their shards: {fault}; delete them"
            " to have the shards packed again"
        )
    shard_index.write(tables, out / INDEX)


def _line(name: str) -> str:
    """A class name without line breaks."""
    return printable(name, LONGEST) if {"\n", "\r"} & set(name) else name


def _summary(out: Path) -> str:
    """Delete the temporary files of a finished pack; returns a sentence about its contents."""
    if (out / PARTIAL).exists():
        for file in (out / PARTIAL).iterdir():
            file.unlink()
        (out / PARTIAL).rmdir()
    tables = shard_index.load(out / INDEX, shards.found_in(out))
    broken = (out / BROKEN).read_text("utf-8", "surrogateescape").count("\n")
    skipped = f"; {broken} images are broken, see {out / BROKEN}" if broken else ""
    images, size = len(tables["offset_N"]), int(tables["bytes_S"].sum())
    count = f"{images} images in {len(tables['bytes_S'])} shards"
    return f"{out}: {count}, {size / 1e6:.1f} MB{skipped}"


def _name(number: int) -> str:
    return f"{number:06d}.tar"


def _write(file: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(file, text, "surrogateescape")
