"""A script: reads hundreds of damaged shards, indexes and images, and prints how each ended.

`hostile_inputs.py FOLDER SEED COUNT` prints a JSON object per line: the kind, the case's number,
`ended` (ok, refused, or the exception), and its seconds.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import sys
import tarfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
from pictures import encode, orientation, photo

from unic_ds import data
from unic_ds.config import Data
from unic_ds.data import torch_decoder
from unic_ds.data.reader import Reader, Undecodable
from unic_ds.data.shards import INDEX

SECONDS = 5
ROOM = 1 << 30
"""Bytes of address space that a case may take."""
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


class TooLong(BaseException):
    """Raised by the alarm, past every `except Exception`."""


def too_long(*_: object) -> None:
    raise TooLong


def images() -> list[bytes]:
    """One small image of each kind."""
    picture = photo(60, 40)
    kinds = [("JPEG", {"progressive": True}), ("JPEG", {"exif": orientation(6)}), ("PNG", {})]
    kinds += [("WEBP", {}), ("BMP", {})]
    return [encode(picture, kind, **more).tobytes() for kind, more in kinds]


def tar(contents: list[bytes], form: int) -> bytes:
    """A shard of images with labels; one name is long, one is not ASCII."""
    names = ["a", "l" * 70 + "/" + "m" * 70, "é", "c/d", "e"]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for i, (name, content) in enumerate(zip(names, contents, strict=True)):
            for ending, body in (("jpg", content), ("cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    return file.getvalue()


def mended(block: bytes) -> bytes:
    """A tar header with the right checksum."""
    total = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")
    return block[:148] + b"%06o\0 " % total + block[156:]


def harmed_tar(whole: bytes, rng: random.Random) -> bytes:
    """A shard with headers changed, blocks doubled, moved or missing."""
    blocks = [whole[i : i + 512] for i in range(0, len(whole), 512)]
    headers = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for _ in range(rng.randint(1, 2)):
        at = rng.choice(headers)
        block = bytearray(blocks[at])
        match rng.randrange(6):
            case 0:
                block[rng.randrange(512)] ^= 1 << rng.randrange(8)
            case 1:
                block[124:136] = rng.choice([b"\x80", b"\xff", b"7", b" "]) + rng.randbytes(11)
            case 2:
                block[124:136] = b"%011o\0" % rng.choice([0, 511, 1 << 20, 1 << 32])
            case 3:
                block[156] = rng.choice(b"0123456789xgLKSDMVNA")
            case 4:
                block[: rng.randrange(1, 100)] = rng.randbytes(rng.randrange(1, 100))
                block = block[:512].ljust(512, b"\0")
            case _:
                blocks.insert(rng.randrange(len(blocks)), blocks[at])
                continue
        blocks[at] = mended(bytes(block)) if rng.random() < 0.95 else bytes(block)
    if rng.random() < 0.3:
        data = at if (at := rng.randrange(len(blocks))) not in headers else min(at + 1, 9)
        blocks[data] = rng.randbytes(512)
    joined = b"".join(blocks)
    return joined[: rng.randrange(len(joined))] if rng.random() < 0.1 else joined


def harmed_index(file: Path, rng: random.Random) -> None:
    """An index with bits flipped, cut short, or with arrays changed, swapped or missing."""
    whole = file.read_bytes()
    match rng.randrange(4):
        case 0:
            file.write_bytes(harmed_bytes(whole, rng))
            return
        case 1:
            file.write_bytes(whole[: rng.randrange(len(whole))])
            return
    with np.load(file) as stored:
        tables = dict(stored)
    one, other = rng.sample([name for name, array in sorted(tables.items()) if array.size], 2)
    match rng.randrange(5):
        case 0:
            tables[one], tables[other] = tables[other], tables[one]
        case 1:
            del tables[one]
        case 2:
            tables[one] = (
                tables[one][: len(tables[one]) // 2] if tables[one].ndim else tables[other]
            )
        case 3:
            tables[one] = tables[one].astype(rng.choice([np.int8, np.uint64, np.float32, "U4"]))
        case _:
            values = tables[one].copy().reshape(-1)
            info = np.iinfo(values.dtype)
            values[rng.randrange(len(values))] = rng.choice(
                [info.min, info.max, 0, 1, info.max // 2]
            )
            tables[one] = values.reshape(tables[one].shape)
    with file.open("wb") as out:
        np.savez(out, **tables)


def harmed_bytes(whole: bytes, rng: random.Random) -> bytes:
    """Bytes with a few changed, doubled or missing."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(200, len(data)))
        data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), 0, 255])
    if rng.random() < 0.2:
        at = rng.randrange(len(data))
        data[at:at] = data[at : at + rng.randrange(1000)]
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def prepare(folder: Path, kind: str, rng: random.Random) -> None:
    """Write a shard (and its index) with something wrong."""
    for file in folder.iterdir():
        file.unlink()
    contents = images()
    if kind == "image":
        contents = [harmed_bytes(content, rng) for content in contents]
    whole = tar(contents, rng.choice(FORMATS))
    (folder / "s.tar").write_bytes(harmed_tar(whole, rng) if kind == "tar" else whole)
    if kind == "index":
        data.scan(folder)
        harmed_index(folder / INDEX, rng)


def use(folder: Path) -> str:
    """Scan, measure and decode all that a folder holds; returns how that ended."""
    try:
        source = data.scan(folder)
        reader = Reader(source, Data(max_megapixels=4, bad_limit=1))
        for index in range(len(source)):
            sample = reader.read(index)
            try:
                torch_decoder.decode(sample.encoded, 0, 0, sample.width, sample.height)
            except Undecodable as error:
                reader.mark(sample.index, str(error))
        return "ok"
    except ValueError as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        ours = "unic_ds" in Path(at.filename).parts and str(error)
        return "refused" if ours else f"{at.filename}:{at.lineno} {error!r}"
    except (Exception, TooLong) as error:
        return "".join(traceback.format_exception(error))[-2000:]


def main(folder: Path, seed: int, count: int) -> None:
    """Run `count` cases of each kind."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_long)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    for kind in ("tar", "index", "image"):
        for case in range(count):
            prepare(folder, kind, random.Random(f"{seed} {kind} {case}"))
            began = time.process_time()
            signal.alarm(4 * SECONDS)
            ended = use(folder)
            signal.alarm(0)
            row = {"kind": kind, "case": case, "ended": ended}
            print(json.dumps(row | {"seconds": time.process_time() - began}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
