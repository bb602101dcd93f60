"""Read the headers of a tar archive block by block, without its data and within limits.

`tarfile` reads an extension header of any announced size, recurses once per extension, follows
negative sizes backwards, and stops silently at a damaged header, which drops all later images.
Formats: ustar, GNU, PAX (POSIX.1-2001), v7.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from unic_ds.files.printable import printable

BLOCK = 512
EXTENSION = 1 << 20
"""Bytes of the largest PAX header or GNU long name that is read."""

TAIL = 1 << 20
"""Bytes after the end of an archive that are checked."""

REGULAR, FOLDER = (b"0", b"\0", b"7"), b"5"
LINKS, DEVICES = (b"1", b"2"), (b"3", b"4", b"6")
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL, SPARSE = b"L", b"K", (b"x", b"X"), b"g", b"S"
EXTENSIONS = (LONG_NAME, LONG_LINK, *PAX, PAX_GLOBAL)
SPARSE_KEY = b"GNU.sparse."
RECORD = re.compile(rb"(\d{1,18}) ([^=]+)=")


class DamagedTar(ValueError):
    """An archive that cannot be read; the message is the reason, without the file's name."""


class Header(NamedTuple):
    """A member of an archive."""

    name: str
    kind: bytes  # type flag
    offset: int  # of its data, in bytes
    size: int  # bytes


class Archive:
    """Iterates over the headers of an open tar file, in order.

    After the last, `ending` is a phrase about an unusual end of the file, "" if it is as usual.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self.ending = ""

    def __iter__(self) -> Iterator[Header]:
        at, general, extra = 0, dict[bytes, bytes](), dict[bytes, bytes]()
        while (block := self._next(at)) is not None:
            kind, size, name = block[156:157], _size(block, at), _name(block)
            data = at + BLOCK
            if kind in EXTENSIONS:
                at = self._end(data, size, name)
                text = self._text(data, size)
                if kind == LONG_NAME:
                    extra[b"path"] = text.partition(b"\0")[0]
                elif kind in PAX:
                    extra |= _records(text, data)
                elif kind == PAX_GLOBAL:
                    general |= _records(text, data)
                continue
            records, extra = general | extra, {}
            name, size = records.get(b"path", name), _pax_size(records, size, name)
            if kind == SPARSE or SPARSE_KEY in records:
                raise DamagedTar(f"member {_shown(name)} is sparse; write it without --sparse")
            kind = FOLDER if name.endswith(b"/") and kind in REGULAR[:2] else kind
            size = 0 if kind in (FOLDER, *LINKS, *DEVICES) else size
            at = self._end(data, size, name)
            yield Header(os.fsdecode(name), kind, data, size)
        if extra:
            raise DamagedTar(f"no member follows the extension header before byte {at}")

    def _next(self, at: int) -> bytes | None:
        """The header at byte `at`, or None at the end of the archive."""
        self._file.seek(at)
        block = self._file.read(BLOCK)
        if not at and not block:
            raise DamagedTar("it is empty")
        if not block.strip(b"\0"):
            self.ending = self._tail(at) if block else "without an end mark (may be cut off)"
            return None
        if len(block) < BLOCK and at:
            raise DamagedTar(f"it ends inside the header at byte {at}")
        if len(block) < BLOCK or not _checksum_fits(block):
            raise DamagedTar(
                _describe_other(block) if not at else f"there is no header at byte {at}"
            )
        return block

    def _tail(self, at: int) -> str:
        """A phrase about data after the first empty block, "" if only padding follows."""
        self._file.seek(at)
        tail = self._file.read(TAIL)
        more = "with data after the end mark (join archives with tar --concatenate, not with cat)"
        return more if tail.strip(b"\0") else ""

    def _end(self, data: int, size: int, name: bytes) -> int:
        """Offset of the block after a member's data; DamagedTar if the file ends before it."""
        if not 0 <= size <= self.size - data:
            left = max(0, self.size - data)
            raise DamagedTar(f"member {_shown(name)} announces {size} bytes, {left} are left")
        end = data + -(-size // BLOCK) * BLOCK
        if end > self.size:
            raise DamagedTar(f"it ends inside member {_shown(name)}")
        return end

    def _text(self, at: int, size: int) -> bytes:
        """The data of an extension header; DamagedTar if it is too large."""
        if size > EXTENSION:
            raise DamagedTar(f"the extension header at byte {at - BLOCK} has {size} bytes")
        self._file.seek(at)
        return self._file.read(size)


def _checksum_fits(block: bytes) -> bool:
    """True if a header has its checksum, of unsigned or (old programs) of signed bytes."""
    found = _number(block[148:156])
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if found == total:
        return True
    return found == total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _number(field: bytes) -> int | None:
    """A number in octal digits or in GNU's base 256; None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    if field[0] == 0xFF:
        return int.from_bytes(field, signed=True)
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _size(block: bytes, at: int) -> int:
    size = _number(block[124:136])
    if size is None:
        raise DamagedTar(f"the header at byte {at} has a size that is not a number")
    return size


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and block[257:265] != b"ustar  \0" else name


def _records(data: bytes, at: int) -> dict[bytes, bytes]:
    """Path, size and sparse keys of a PAX header, whose records are `LENGTH KEY=VALUE\\n`."""
    records, start = dict[bytes, bytes](), 0
    while start < len(data) and data[start]:
        found = RECORD.match(data, start)
        end = start + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise DamagedTar(f"the extension header at byte {at - BLOCK} is damaged")
        key = SPARSE_KEY if found[2].startswith(SPARSE_KEY) else found[2]
        if key in (b"path", b"size", SPARSE_KEY):
            records[key] = data[found.end() : end - 1]
        start = end
    return records


def _pax_size(records: dict[bytes, bytes], size: int, name: bytes) -> int:
    """A member's size from its PAX header, `size` if that has none."""
    digits = records.get(b"size")
    if digits is None:
        return size
    if not re.fullmatch(rb"\d{1,20}", digits):
        raise DamagedTar(f"member {_shown(name)} announces {_shown(digits)} bytes")
    return int(digits)


def _describe_other(block: bytes) -> str:
    """The format of a file that is not a tar archive, with a remedy."""
    for start, text in {
        b"\x1f\x8b": "it is compressed by gzip; unpack it",
        b"\x28\xb5\x2f\xfd": "it is compressed by zstd; unpack it",
        b"\xfd7zXZ": "it is compressed by xz; unpack it",
        b"BZh": "it is compressed by bzip2; unpack it",
        b"PK\x03\x04": "it is a zip archive; unpack it",
        b"version https://git-lfs": "it is a Git LFS pointer; run git lfs pull to fetch the file",
    }.items():
        if block.startswith(start):
            return text
    return "it does not begin with a tar header"


def _shown(name: bytes) -> str:
    return f"'{printable(os.fsdecode(name), 100)}'"
