"""Limits on the time and memory that an image may cost, checked before any parser or decoder runs.

Header parsers take time per segment or chunk, decoders of progressive JPEGs per scan, and a file
may have any number of these.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

import numpy as np

METADATA = 16_000_000
"""Bytes before the first scan of a JPEG; bytes of all chunks without pixels of a PNG or WebP."""
SEGMENTS = 1024  # of a JPEG before its first scan
FILL = 65536  # bytes of a JPEG's header that belong to no segment
SCANS = 100  # of a JPEG; encoders make 10 to 20
CHUNKS = 65536  # of a PNG or WebP; encoders make one per 8 kB or more
CHUNK = 8_000_000  # bytes of a chunk without pixels: libpng's limit
INFLATED = 4_000_000  # bytes of a PNG above which its inflated size is checked
PIECE = 1 << 26  # bytes inflated at a time
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG colour type
RUN_LENGTHS = 4_000_000  # pixels of a run-length encoded BMP

SCAN, FRAMES = 0xDA, {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}  # markers
SEQUENTIAL = {0xC0, 0xC1, 0xC9}  # frames that one scan of all components completes
_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_AFTER_PIXELS = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # FF00 and RST are pixel data


def check(data: bytes) -> None:
    """Raise ValueError for an image above the limits of its format; other formats pass."""
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_chunks(_png_chunks(data), (b"IDAT", b"fdAT"))
    elif data.startswith(b"RIFF"):
        _check_chunks(_riff_chunks(data), (b"VP8 ", b"VP8L", b"ALPH", b"ANMF"))
    elif data.startswith(b"BM"):
        _check_bmp(data)


def _check_jpeg(data: bytes) -> None:
    """Raise ValueError for a JPEG whose header or number of scans exceeds the limits."""
    at, fill, frame, components = 2, 0, 0, 0
    for _ in range(SEGMENTS):
        if at > METADATA:
            raise ValueError(f"has more than {METADATA} bytes before its first scan")
        found = _MARKER.search(data, at)
        if not found:
            return  # no scan: the parser raises an error
        fill += found.start() - at
        if fill > FILL:
            raise ValueError(f"has more than {FILL} bytes outside of segments")
        at, code = found.start(), data[found.start() + 1]
        if code == SCAN:
            break
        if code in FRAMES:
            frame, components = code, int.from_bytes(data[at + 9 : at + 10])
        at = _after(data, at)
    else:
        raise ValueError(f"has more than {SEGMENTS} segments before its first scan")
    if frame in SEQUENTIAL and data[at + 4 : at + 5] == bytes([components]):
        return  # the decoder stops after one scan
    byte_N = np.frombuffer(data, dtype=np.uint8, offset=at)
    scans = np.count_nonzero((byte_N[:-1] == 0xFF) & (byte_N[1:] == SCAN))
    if scans > SCANS and _has_many_scans(data, at):
        raise ValueError(f"has more than {SCANS} scans")


def check_inflated(data: bytes, width: int, height: int) -> None:
    """Raise ValueError for a PNG whose data inflates to more than twice the size of its pixels.

    libpng inflates surplus data, up to a thousand times the size of the file. Small files pass
    unchecked: they cost seconds at most. Other formats pass.
    """
    if len(data) <= INFLATED or not data.startswith(b"\x89PNG"):
        return
    bits = CHANNELS.get(data[25], 4) * data[24]
    limit = 2 * height * (1 + (width * bits + 7) // 8) + FILL
    inflate, size = zlib.decompressobj(), 0
    try:
        for kind, start, end in _png_chunks(data):
            tail = data[start:end] if kind == b"IDAT" else b""
            while tail:
                size += len(inflate.decompress(tail, PIECE))
                tail = inflate.unconsumed_tail
                if size > limit:
                    raise ValueError("inflates to more than twice the size of its pixels")
    except zlib.error:
        return  # broken: the decoder raises an error


def _check_bmp(data: bytes) -> None:
    """Raise ValueError for a BMP of 16 bits per pixel, or a large one with run-length encoding.

    Decoders disagree about the former; PIL decodes the latter in Python, 0.5 us per pixel.
    """
    if len(data) < 34:
        return  # cut off: the parser raises an error
    old = int.from_bytes(data[14:18], "little") < 40  # OS/2 header: no compression
    if data[24 if old else 28] == 16:
        raise ValueError("is a BMP with 16 bits per pixel, which decoders read differently")
    width, height = (int.from_bytes(data[i : i + 4], "little", signed=True) for i in (18, 22))
    if not old and data[30] in (1, 2) and abs(width * height) > RUN_LENGTHS:
        raise ValueError(f"is a run-length encoded BMP with more than {RUN_LENGTHS} pixels")


def _check_chunks(chunks: Iterator[tuple[bytes, int, int]], pixels: tuple[bytes, ...]) -> None:
    """Raise ValueError above the limits; `pixels` are the kinds of chunks with pixel data."""
    metadata = 0
    for number, (kind, start, end) in enumerate(chunks):
        if number == CHUNKS:
            raise ValueError(f"has more than {CHUNKS} chunks")
        if kind not in pixels:
            size = end - start
            metadata += size
            if size > CHUNK or metadata > METADATA:
                limit = f"more than {CHUNK} in a chunk or {METADATA} in all"
                raise ValueError(f"has too many bytes in chunks without pixels, {limit}")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk of a PNG before IEND."""
    at = 8
    while (kind := data[at + 4 : at + 8]) not in (b"IEND", b""):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        yield kind, at + 8, end
        at = end + 4  # skips the checksum


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk of a WebP."""
    at, stop = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at < stop:
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], at + 8, end
        at = end + end % 2


def _after(data: bytes, at: int) -> int:
    """Offset of the byte after the segment that begins at `at`."""
    if data[at + 1] in WITHOUT_LENGTH:
        return at + 2
    return at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))


def _has_many_scans(data: bytes, at: int) -> bool:
    """True if the image has more than SCANS scans, or more than four segments per scan.

    The two bytes that begin a scan may also occur in data after the image, such as a video.
    """
    scans = 0
    for _ in range(4 * SCANS):
        scans += data[at + 1] == SCAN
        found = _AFTER_PIXELS.search(data, _after(data, at))
        if scans > SCANS:
            return True
        if not found or data[found.start() + 1] == 0xD9:
            return False
        at = found.start()
    return True
