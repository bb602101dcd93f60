"""Bounded reads of files from outside, atomic writes, and paths. Stdlib only.

A path from a list or a folder may name a device, a pipe without a writer, or a file larger than
memory.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

TEXT_LIMIT = 16 << 20
"""Bytes of the largest text file that is read (settings, manifests, class names)."""


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file for reading; OSError for anything else, without waiting for a pipe."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
    return os.fdopen(number, "rb")


def read_limited(path: Path | str, limit: int) -> bytes:
    """All bytes of a regular file; OSError (EFBIG) before reading if they exceed `limit`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"has {size} bytes, more than {limit}", os.fspath(path))
        data = file.read(limit + 1) or b""  # None if nothing can be read without waiting
    if len(data) > limit:  # it has grown, or reports no size
        raise OSError(errno.EFBIG, f"has more than {limit} bytes", os.fspath(path))
    return data


def read_into(file: BinaryIO, offset: int, buffer: memoryview) -> bool:
    """Fill a contiguous buffer with bytes from `offset`; False if the file ends before."""
    left = buffer.cast("B")
    while left and (count := os.preadv(file.fileno(), [left], offset)):
        left, offset = left[count:], offset + count
    return not left


def read_text(path: Path | str, limit: int = TEXT_LIMIT) -> str:
    """Text of a UTF-8 file, with or without a byte order mark; ValueError if it is not UTF-8.

    OSError as `read_limited`.
    """
    try:
        return read_limited(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text (byte {error.start})") from None


def encodable(path: Path) -> Path:
    """Path to the same existing file or folder, for libraries that accept only UTF-8 paths.

    It is valid until this process exits. A file keeps its suffix, by which formats are recognised.
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
    """True if a path is valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_atomic(file: Path, text: str, errors: str = "backslashreplace") -> None:
    """Write `text` in UTF-8 atomically: a reader sees the old or the new content, never a part.

    Bytes of a path that are not UTF-8 become escapes; `errors` is that of `str.encode`.
    """
    with open_atomic(file) as stream:
        stream.write(text.encode("utf-8", errors))


@contextmanager
def open_atomic(file: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Context manager of a temporary file that replaces `file` at its end, unless it fails.

    The temporary file is in the same folder under a random name, and must not exist before: in a
    folder that others may write to, it could be their link. With `sync` it is on the disk before it
    is renamed, so that a power cut leaves the old or the new content.
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


def replace_folder(new: Path, old: Path) -> None:
    """Rename a complete folder to the name of an older one, if there is one, and delete that.

    The older one is renamed before: a kill never leaves a partial folder under its name. OSError,
    with both as they were, for a link: what it names may be on another disk.
    """
    if old.is_symlink():
        why = "is a link, which no folder replaces; remove it, or give the folder that it names"
        raise OSError(errno.ELOOP, why, os.fspath(old))
    if old.exists():
        remove_folder(old)
    new.rename(old)


def remove_folder(folder: Path) -> None:
    """Rename a folder to `.NAME.removed`, then delete it: a kill never leaves a part of it as NAME.

    The next call for the same folder deletes the remains of one that was killed. Of a link to a
    folder, the link alone is removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    shutil.rmtree(folder.rename(removed))


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Context manager that makes a folder; if it fails, the empty folders that it made are gone."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:  # the innermost first
            with suppress(OSError):  # it is not empty
                path.rmdir()
        raise


def nearest_existing(path: Path) -> Path:
    """`path`, or the innermost of its parents that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def sha256(path: Path) -> str:
    """Hex SHA-256 of a regular file, read as a stream; OSError as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_root() -> Path:
    """Folder of data that runs share: `$UNIC_DS_CACHE`, or ~/.cache/unic_ds.

    ValueError if the user has no home.
    """
    if root := os.environ.get("UNIC_DS_CACHE"):
        return Path(root)
    try:
        return Path.home() / ".cache" / "unic_ds"
    except RuntimeError as error:  # a user without an entry in passwd, as in a container
        raise ValueError(
            "this user has no home; set HOME, or UNIC_DS_CACHE to a folder that may be written"
        ) from error


def apply_umask(file: Path) -> None:
    """Set a file's mode by the umask, since safetensors writes files for their owner only."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^Umask:\s*([0-7]+)", status, re.M)
    assert found, "Linux 4.7 and later report the umask"
    file.chmod(0o666 & ~int(found[1], 8))
