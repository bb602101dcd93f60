"""Files of samples with dense annotations: names below a folder, reads, and a seeded sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import dist, rng
from unic_ds.config import Data
from unic_ds.data import reader, torch_decoder
from unic_ds.data.source import versions_of
from unic_ds.evaluate.samples import UnreadableImage
from unic_ds.files import read_limited
from unic_ds.files.printable import printable


def stays_inside(name: object) -> bool:
    """True for a relative path that does not leave its folder by its name."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def missing(folder: Path, names: Sequence[str]) -> list[str]:
    """Names that are no files below the folder; folders are listed, not the files asked for."""
    known = {parent: listed(folder / parent) for parent in {str(Path(n).parent) for n in names}}
    return [name for name in names if Path(name).name not in known[str(Path(name).parent)]]


def listed(folder: Path) -> frozenset[str]:
    """Names in a folder; none if it cannot be listed."""
    try:
        return frozenset(path.name for path in folder.iterdir())
    except OSError:
        return frozenset()


def read_image(file: Path, limits: Data) -> Tensor:
    """An image as uint8 RGB 3HW, upright; UnreadableImage with the file's name and the reason."""
    with named(file):
        encoded = encoded_bytes(file, limits)
        width, height = reader.measure(encoded, limits.max_megapixels)
        return torch_decoder.decode(encoded, 0, 0, width, height)


def measure(file: Path, limits: Data) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, by its header; errors as `read_image`."""
    with named(file):
        return reader.measure(encoded_bytes(file, limits), limits.max_megapixels)


def encoded_bytes(file: Path, limits: Data) -> NDArray[np.uint8]:
    """Bytes of an image file of at most `data.max_mb`."""
    return np.frombuffer(read_limited(file, int(limits.max_mb * 1e6)), dtype=np.uint8)


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Context manager that turns a file's errors into UnreadableImage with its name."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        raise UnreadableImage(f"{printable(file)} {reason}") from error
    except (ValueError, reader.Undecodable) as error:
        raise UnreadableImage(f"{printable(file)} {printable(error)}") from error


def sampled(count: int, limit: int, seed: int) -> NDArray[np.int64]:
    """Places of at most `limit` of `count` samples (0: all), seeded and ascending."""
    bits_N = rng.random_bits(seed, "probe", 1, np.arange(count))[:, 0]
    return np.sort(np.argsort(bits_N, kind="stable")[: limit or None])


def identity(files: Iterable[Path], *facts: object) -> str:
    """Hash of the names, sizes and times of files, and of what else decides the samples.

    Every rank calls it with the same; rank 0 looks at the files. One that cannot be read, such as
    a broken link, counts by its name.
    """
    paths = list(files)
    versions = dist.on_rank_0(lambda: versions_of(paths))
    lines = [f"{path} {version}" for path, version in zip(paths, versions, strict=True)]
    text = json.dumps([lines, [repr(fact) for fact in facts]])
    return hashlib.sha256(text.encode()).hexdigest()
