"""Tensor files: safetensors and torch.save, written, read within bounds and hashed by content.

Torch's restricted unpickler reads the pickle of torch.save. The sizes that a file declares are
compared with the size of the file before memory is allocated for them.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unic_ds.files import apply_umask, encodable, open_regular
from unic_ds.files.printable import printable

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights; float8 and integers need scales, which files do not have."""
DIRECTORY_LIMIT = 16 << 20
"""Bytes of the largest safetensors header, and of the largest pickle of a torch file."""
COUNT_LIMIT = 20_000
"""Tensors of the largest file; the largest models have some thousands."""
CLAIM = 4
"""Largest ratio of the size of tensors to that of their file; above 1, since tied weights are
stored once."""
ZIP = b"PK\x03\x04"


class Safetensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file by name, in sorted order, memory-mapped on access.

    ValueError for a file that is missing, damaged or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open_regular(path) as file:
                if int.from_bytes(file.read(8), "little") > DIRECTORY_LIMIT:
                    raise ValueError(f"its header is larger than {DIRECTORY_LIMIT} bytes")
            self.file = safe_open(encodable(path), "pt")
            self.names = dict.fromkeys(sorted(self.file.keys()))
            self.metadata: dict[str, str] = self.file.metadata() or {}
        except (OSError, ValueError, MemoryError, SafetensorError) as error:
            raise unreadable(path, error) from None
        refuse_many(path, len(self.names))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        try:
            return self.file.get_tensor(name)
        except SafetensorError as error:
            raise unreadable(self.path, error) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def unreadable(path: Path, error: Exception) -> ValueError:
    """Error for a damaged safetensors file."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ValueError(f"{str(path)!r} cannot be read as safetensors ({printable(why)})")


def refuse_many(path: Path, count: int) -> None:
    """ValueError for more tensors than any model has."""
    if count > COUNT_LIMIT:
        raise ValueError(f"{str(path)!r} has {count} tensors, more than {COUNT_LIMIT}")


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ValueError as `Safetensors`."""
    return dict(Safetensors(path))


def save(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; the same tensors and metadata give the same bytes.

    OSError if it cannot be written.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(plain, encodable(path), dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written ({printable(error)})") from None
    if metadata:
        sort_metadata(path)
    apply_umask(path)


def sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a file, which safetensors writes in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def unpickle(
    path: Path, admitted: Iterable[tuple[type, str]] = (), *, checksums: bool = False
) -> Any:
    """Content of a file of torch.save, on the CPU, and memory-mapped if it is a zip archive.

    Torch's restricted unpickler reads it, which only calls functions that rebuild tensors; a class
    of `admitted` replaces the global of that name in the pickle. `checksums` verifies those of all
    parts. ValueError names the global that is not allowed, or the fault of the file.
    """
    try:
        with open_regular(path) as file:
            head = file.read(len(ZIP))
        if not head:
            raise ValueError("it is empty")
        if zipped := head == ZIP:
            check_archive(path, checksums=checksums)
        with (
            torch.serialization.safe_globals(list(admitted)),
            warnings.catch_warnings(action="ignore"),  # of protocols that torch.save does not write
        ):
            return torch.load(encodable(path), map_location="cpu", weights_only=True, mmap=zipped)
    # A damaged pickle makes the unpickler raise any exception; each becomes a sentence.
    except Exception as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{str(path)!r} is refused: it names {printable(foreign[1])}, which no weights need"
            ) from None
        raise ValueError(
            f"{str(path)!r} cannot be read as a checkpoint: {reason_of(error)}"
        ) from None


def reason_of(error: Exception) -> str:
    """Torch's reason why a file cannot be read, without its advice to load it unrestricted."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "it asks for more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    line = (text or type(error).__name__).splitlines()[0]
    return printable("it is of an old kind" if "weights_only" in line else line)


def check_archive(path: Path, *, checksums: bool) -> None:
    """ValueError for a torch archive that is compressed, damaged or has too many parts."""
    with zipfile.ZipFile(path) as archive:
        check_sizes(archive.infolist(), path.stat().st_size)
        if checksums and (broken := archive.testzip()):  # torch itself checks none
            raise ValueError(f"{printable(broken)} is damaged")


def check_sizes(parts: list[zipfile.ZipInfo], size: int) -> None:
    """ValueError for too many parts, or parts larger than their file of `size` bytes."""
    if len(parts) > COUNT_LIMIT:
        raise ValueError(f"it has {len(parts)} parts, more than {COUNT_LIMIT}")
    for part in parts:
        if part.file_size != part.compress_size and "/code/" not in part.filename:
            raise ValueError(
                f"{printable(part.filename)} inflates from {part.compress_size} to"
                f" {part.file_size} bytes, but torch.save compresses nothing"
            )
        if part.filename.endswith(".pkl") and part.file_size > DIRECTORY_LIMIT:
            raise ValueError(
                f"{printable(part.filename)} has {part.file_size} bytes, more than"
                f" {DIRECTORY_LIMIT}"
            )
    code = sum(part.file_size for part in parts if part.file_size != part.compress_size)
    if code > DIRECTORY_LIMIT or sum(part.file_size for part in parts) - code > size:
        raise ValueError("its parts are larger than the file")


def refuse_oversized(path: Path, tensors: Iterable[Tensor]) -> None:
    """ValueError for tensors that are more than `CLAIM` times as large as their file."""
    claimed, size = sum(x.numel() * x.element_size() for x in tensors), path.stat().st_size
    if claimed > CLAIM * size:
        raise ValueError(f"{str(path)!r} claims {claimed} bytes of tensors in {size}")


def unlike_weights(value: object) -> str:
    """Reason why a value is no plain tensor of an allowed type, or empty; integers are allowed."""
    if not isinstance(value, Tensor):
        return f"is no tensor but {type(value).__name__}"
    kinds = {
        "nested": value.is_nested,
        "sparse": value.layout != torch.strided,
        "quantised": value.is_quantized,
        "without contents": value.is_meta,
    }
    if odd := [kind for kind, found in kinds.items() if found]:
        return f"is a tensor that is {odd[0]}"
    if value.is_complex() or (value.is_floating_point() and value.dtype not in FLOATS):
        return not_floating(value)
    return ""


def not_floating(value: Tensor) -> str:
    """Clause about a tensor whose type is none of FLOATS."""
    kind = str(value.dtype).removeprefix("torch.")
    return f"is {kind}, not float32, bfloat16, float16 or float64"


def is_finite(value: Tensor) -> bool:
    """True if all numbers of a floating-point tensor are finite."""
    # A sum is finite only if all numbers are, and needs no memory; it may overflow, though.
    total = value.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(value.isfinite().all())


def find_unsound(state: Mapping[str, Tensor]) -> str:
    """Describe the first tensor that is not floating or not finite; empty if there is none."""
    for name, value in state.items():
        if name.endswith(".num_batches_tracked"):
            continue
        why = unlike_weights(value)
        if not why and not value.is_floating_point():
            why = not_floating(value)
        if not why and not is_finite(value):
            why = "is not finite"
        if why:
            return f"{printable(name)} {why}"
    return ""


def misfit(state: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """Describe how names and shapes of weights differ from those of `want`; empty if they fit.

    The first difference of each kind is named.
    """
    shapes = [
        f"{printable(k)} is {tuple(v.shape)}, not {tuple(want[k].shape)}"
        for k, v in state.items()
        if k in want and v.shape != want[k].shape
    ]
    kinds = (
        [f"{name} is missing" for name in sorted(want.keys() - state.keys())],
        [f"{printable(name)} is unknown" for name in sorted(state.keys() - want.keys())],
        shapes,
    )
    clauses = [
        f"{rows[0]}{f' and {len(rows) - 1} more' if rows[1:] else ''}" for rows in kinds if rows
    ]
    return "; ".join(clauses)


def content(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, types, shapes and bytes of plain tensors, independent of the file."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach()
        kind = [name, str(value.dtype).removeprefix("torch."), list(value.shape)]
        total.update(json.dumps(kind).encode())
        total.update(raw_bytes(value))
    return total.hexdigest()


def raw_bytes(value: Tensor) -> memoryview:
    """Bytes of a tensor."""
    return value.cpu().contiguous().flatten().view(torch.uint8).numpy().data
