"""Read the bytes and header of samples; a sample that cannot be read is replaced by its neighbour.

Bytes from outside are hostile: the format is recognised by the first bytes and the size is read
from the header before any decoder sees them. The neighbour is the next index, cyclically, that can
be read, so it does not depend on when or on which rank the fault was found.
"""

from __future__ import annotations

import io
import logging
import struct
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from unic_ds.config import Data
from unic_ds.data import limits
from unic_ds.data.source import Source
from unic_ds.files.printable import printable

ORIENTATION = 0x0112  # EXIF tag; 5 to 8 turn the image by a quarter
END_OF_JPEG = b"\xff\xd9"  # cannot occur inside a scan
TAIL = 65536  # bytes of a PNG that are searched for EXIF
LISTED = 20  # bad files that the error names
log = logging.getLogger("unic_ds.data")


class Undecodable(Exception):
    """An image of a batch cannot be decoded."""


class Jpeg(JpegImagePlugin.JpegImageFile):
    """PIL's JPEG reader, without the resolution from EXIF."""

    def _read_dpi_from_exif(self) -> None:
        """Skip EXIF: `orientation` reads the tag that is needed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An encoded image; width and height in pixels are of the upright image."""

    index: int
    encoded: NDArray[np.uint8]
    width: int
    height: int


def measure(encoded: NDArray[np.uint8], max_megapixels: float) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, from the header.

    ValueError with the reason if the image is refused. A JPEG without an end marker is refused
    here: a decoder would fail only if the crop reaches the missing part.
    """
    data = encoded.tobytes()
    limits.check(data)
    try:
        with opened(data) as image:
            width, height = image.size
            bytes_of_header = image.fp.tell() if image.fp else 0
            turned = orientation(image) in (5, 6, 7, 8)
            default_image = getattr(image, "default_image", False)
            cut = image.format == "JPEG" and data.rfind(END_OF_JPEG) < bytes_of_header
    except ValueError:
        raise
    except Exception as error:  # on hostile bytes PIL raises SyntaxError, OSError, KeyError, ...
        reason = str(error) or type(error).__name__
        raise ValueError(f"has a header that cannot be read ({reason})") from error
    if cut:
        raise ValueError("is cut off")
    if default_image:
        raise ValueError("is an animated PNG whose default image is not one of its frames")
    if width * height > max_megapixels * 1e6:
        limit = f"data.max_megapixels {max_megapixels:g}"
        raise ValueError(f"has {width} x {height} pixels, more than {limit}")
    limits.check_inflated(data, width, height)
    return (height, width) if turned else (width, height)


def opened(data: bytes) -> ImageFile:
    """Open an image with PIL's reader of its format, without decoding it.

    The first bytes choose the reader, so no other parser sees the bytes. ValueError for another
    format; on a broken header, any exception that PIL raises.
    """
    if not data:
        raise ValueError("is empty")
    if data.startswith(b"\xff\xd8\xff"):
        return Jpeg(io.BytesIO(data))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _with_late_exif(PngImagePlugin.PngImageFile(io.BytesIO(data)), data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(io.BytesIO(data))
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile(io.BytesIO(data))
    raise ValueError("is not a JPEG, PNG, WebP or BMP file")


def _with_late_exif(image: PngImagePlugin.PngImageFile, data: bytes) -> ImageFile:
    """Add EXIF from behind a PNG's pixels, which PIL reads only when it decodes them."""
    at = data.rfind(b"eXIf", max(0, len(data) - TAIL))
    if at > 0 and "exif" not in image.info:
        image.info["exif"] = data[at + 4 : at + 4 + int.from_bytes(data[at - 4 : at])]
    return image


def orientation(image: ImageFile) -> int:
    """EXIF orientation (1 to 8) from the first directory, as the decoders read it; 1 if absent.

    PIL's own `getexif` also uses XMP, reads every value and prints a warning for each broken one,
    10,000 for one picture.
    """
    block = image.info.get("exif", b"")
    if image.format != "WEBP":
        block = block.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4], "")
    if not order or len(block) < 10:
        return 1
    (at,) = struct.unpack_from(f"{order}I", block, 4)
    count = int.from_bytes(block[at : at + 2], "little" if order == "<" else "big")
    if image.format == "JPEG" and 12 * count > len(block):  # the decoders ignore such a block
        return 1
    for place in range(at + 2, min(at + 2 + 12 * count, len(block) - 9), 12):
        tag, value = struct.unpack_from(f"{order}H6xH", block, place)
        if tag == ORIENTATION:
            return int(value)
    return 1


def decode_error(encoded: NDArray[np.uint8]) -> str:
    """The reason why PIL does not decode an image; empty if it does."""
    try:
        with opened(encoded.tobytes()) as image:
            image.load()
    except Exception as error:  # on hostile bytes PIL raises SyntaxError, OSError, KeyError, ...
        return str(error) or type(error).__name__
    return ""


class Reader:
    """Reads samples of a source, lists the bad ones and raises if there are too many."""

    def __init__(self, source: Source, cfg: Data):
        self.source = source
        self.cfg = cfg
        self.bad: dict[int, str] = {}
        self._lock = threading.Lock()  # samples are read by several threads

    def read(self, index: int) -> Sample:
        """Sample `index`, or the next that can be read; ValueError if too many cannot."""
        for offset in range(len(self.source)):
            at = (index + offset) % len(self.source)
            if at in self.bad:
                continue
            try:
                encoded = self.source.read(at, self.cfg.max_mb)
                return Sample(at, encoded, *measure(encoded, self.cfg.max_megapixels))
            except OSError as error:
                self.mark(at, f"cannot be read ({error.strerror or error})")
            except ValueError as error:
                self.mark(at, str(error))
        raise ValueError(self._report(f"none of {len(self.source)} images can be read"))

    def mark(self, index: int, reason: str) -> None:
        """Record that sample `index` is bad; ValueError with the list if there are too many."""
        with self._lock:
            if index in self.bad:
                return
            self.bad[index] = reason
        name = printable(self.source.names[index])
        log.warning("%s %s; the next readable image replaces it", name, printable(reason))
        if len(self.bad) > max(1, self.cfg.bad_limit * len(self.source)):
            raise ValueError(
                self._report(f"{len(self.bad)} of {len(self.source)} images cannot be read")
            )

    def listed(self) -> list[tuple[str, str]]:
        """(name, reason) of every bad file so far, sorted by name."""
        with self._lock:
            return sorted((self.source.names[i], reason) for i, reason in self.bad.items())

    def _report(self, count: str) -> str:
        """The error message: a count, the limit, the remedy and the first bad files."""
        rows = [f"  {printable(name)} {printable(reason)}" for name, reason in self.listed()]
        more = [f"  and {len(rows) - LISTED} more"] if len(rows) > LISTED else []
        limit = f"data.bad_limit is {self.cfg.bad_limit:g} of all images"
        head = f"{count} below {str(self.source.folder)!r} ({limit}); repair or remove them:"
        return "\n".join([head, *rows[:LISTED], *more])
