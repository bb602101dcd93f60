"""Files from outside are read up to a limit; files of ours are written whole or not at all.

Stdlib only. A path from a list or a folder may name a device, a pipe that nobody writes to, or
more bytes than there is memory.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEXT_LIMIT = 16 << 20
"""Bytes of the largest text file (settings, manifests, class names) that is read."""


def open_regular(path: Path | str) -> BinaryIO:
    """A regular file, open for reading; OSError for anything else, without waiting for a pipe."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
    return os.fdopen(number, "rb")


def read_limited(path: Path | str, limit: int) -> bytes:
    """All bytes of a regular file; OSError (EFBIG) before reading where they exceed `limit`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"has {size} bytes, more than {limit}", os.fspath(path))
        data = file.read(limit + 1) or b""  # None where nothing can be read without waiting
    if len(data) > limit:  # it has grown, or its size is not told
        raise OSError(errno.EFBIG, f"has more than {limit} bytes", os.fspath(path))
    return data


def read_into(file: BinaryIO, offset: int, buffer: memoryview) -> bool:
    """Fill a contiguous buffer with bytes from `offset`; False where the file ends before."""
    left = buffer.cast("B")
    while left and (count := os.preadv(file.fileno(), [left], offset)):
        left, offset = left[count:], offset + count
    return not left


def read_text(path: Path | str, limit: int = TEXT_LIMIT) -> str:
    """A UTF-8 text file, with or without a byte order mark; ValueError where it is not UTF-8.

    OSError as `read_limited`.
    """
    try:
        return read_limited(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text (byte {error.start})") from None


def encodable(path: Path) -> Path:
    """A path to the same existing file or folder for libraries that take UTF-8 paths alone.

    It is good as long as this process lives. A file's suffix stays, by which formats are known.
    """
    if is_utf8(str(path)):
        return path
    if not path.is_dir() and not is_utf8(path.name):
        _links.append(tempfile.TemporaryDirectory(prefix="unic_ds_"))
        link = Path(_links[-1].name) / f"file{path.suffix if is_utf8(path.suffix) else ''}"
        link.symlink_to(path.absolute())
        return link
    folder, *name = (path,) if path.is_dir() else (path.parent, path.name)
    return Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_CLOEXEC)}", *name)


_links: list[tempfile.TemporaryDirectory[str]] = []  # removed at the end of the process


def is_utf8(text: str) -> bool:
    """True where a path has no bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_whole(file: Path, text: str, errors: str = "backslashreplace") -> None:
    """Write `text` in UTF-8 so that a reader sees the old or the new content, never a part.

    Bytes of a path that are not UTF-8 become escapes, unless `errors` says otherwise.
    """
    with replacing(file) as stream:
        stream.write(text.encode("utf-8", errors))


@contextmanager
def replacing(file: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the place of `file` when the block ends, or goes where it fails.

    It lies beside `file` under a name that nobody can foresee, and is made here or not at all: in a
    folder that others may write, a link under its name would be theirs. With `sync` it is on the
    disk before it is renamed, so that a power cut leaves the old or the new content.
    """
    part = file.with_name(f".{file.name[:200]}.{os.urandom(8).hex()}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    number = os.open(part, flags, 0o666)  # less the umask
    try:
        with os.fdopen(number, "wb") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def apply_umask(file: Path) -> None:
    """Give a file the mode that the umask says: safetensors writes for its owner alone."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^Umask:\s*([0-7]+)", status, re.M)
    assert found, "Linux 4.7 and later tell the umask"
    file.chmod(0o666 & ~int(found[1], 8))
