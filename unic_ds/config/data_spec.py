"""Parses `--data.train` and `--data.val`: one source of images, or a mixture with weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from glob import iglob
from itertools import islice
from pathlib import Path
from typing import NamedTuple

KINDS = "a folder of images or .tar shards, a .tar, or a .txt with one path a line"

COMPRESSED = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    *(".tar.lz4", ".tar.lzma", ".tar.z", ".zip", ".7z", ".rar"),
)
"""Endings of archives whose images cannot be read in place."""
LIMIT, DEPTH = 100_000, 16
"""Most paths that one pattern expands to, and most braces in it."""
URL = re.compile(r"(file|pipe|s3|gs|hf|https?|ftp|hdfs|[a-z][a-z0-9+.-]*(?=://)):", re.I)
BRACES = re.compile(r"\{(?:(-?\d{1,18})\.\.(-?\d{1,18})|([^{}]*,[^{}]*))\}")


class WeightedPath(NamedTuple):
    """One source of a mixture."""

    path: Path
    weight: float  # how often an epoch uses each of its images, on average


def parts(spec: str) -> list[WeightedPath]:
    """Parse the sources of a mixture; ValueError if there is none or a weight is wrong.

    Sources are separated by commas; `PATH=WEIGHT` uses each image of a source WEIGHT times in an
    epoch, on average. A path that exists is taken as it is, even with commas. A path may be a
    pattern (`expanded`).
    """
    if not spec:
        raise ValueError(f"no images are named; set --data.train to {KINDS}")
    if exists(spec):
        return [WeightedPath(Path(spec), 1.0)]
    _refuse_url(spec)
    return [_weighed(_local(part)) for part in _split(spec)]


def indices_of(name: str, sources: Iterable[str]) -> list[int]:
    """Indices of the sources that a name stands for: a path, or else the last parts of paths."""
    paths, ends = list(sources), f"/{name.strip('/')}"
    whole = [i for i, path in enumerate(paths) if path == name]
    return whole or [i for i, path in enumerate(paths) if f"/{path.strip('/')}".endswith(ends)]


def check(spec: str, option: str) -> None:
    """Raise ValueError for a source that is missing, unreadable, empty or of no known kind."""
    for path in (path for part, _ in parts(spec) for path in expanded(part)):
        source = f"{option} {str(path)!r}"
        if not exists(path):
            raise ValueError(f"{source} does not exist; give {KINDS}")
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            raise ValueError(f"{source} may not be read; change its permissions")
        if path.is_dir() and not any(path.iterdir()):
            raise ValueError(f"{source} is empty; give {KINDS}")
        if path.is_file() and path.suffix not in (".tar", ".txt"):
            raise ValueError(f"{source} {remedy(path)}")


def remedy(path: Path) -> str:
    """Clause of an error message about a file that is no source of images, with the remedy."""
    if path.name.lower().endswith(COMPRESSED):
        return "is compressed: its images cannot be read in place; unpack it to .tar or a folder"
    return f"is no source of images; give {KINDS}"


def expanded(path: Path) -> list[Path]:
    """The paths that `a/{000..127}.tar`, `a/{x,y}` or `a/*.tar` stand for, or the path itself.

    ValueError if a pattern expands to no path, to one that does not exist, or to too many.
    """
    pattern = str(path)
    if exists(pattern) or not re.search(r"[{*?\[]", pattern):
        return [path]
    found: dict[str, None] = {}
    if pattern.count("{") > DEPTH:
        raise ValueError(f"{pattern!r} has more than {DEPTH} braces; name the folder")
    patterns = list(islice(_braces(pattern), LIMIT + 1))
    for each in patterns:
        stars = re.search(r"[*?\[]", each) and not exists(each)
        paths = sorted(islice(iglob(each, recursive=True), LIMIT + 1)) if stars else [each]  # noqa: PTH207
        found |= dict.fromkeys(paths)
        if max(len(found), len(patterns)) > LIMIT:
            raise ValueError(f"{pattern!r} stands for more than {LIMIT} paths; name their folder")
    missing = [each for each in found if not exists(each)]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(found)} paths of {pattern!r} do not exist, the first is"
            f" {missing[0]!r}; correct the pattern"
        )
    if not found:
        raise ValueError(f"{pattern!r} stands for no file; correct the pattern")
    return [Path(each) for each in found]


def exists(path: Path | str) -> bool:
    """True if a path exists; False also for a name that no file system allows."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises for a name that is too long


def _braces(pattern: str) -> Iterator[str]:
    """The strings that a pattern's braces stand for, as a shell's; ValueError for too many."""
    found = BRACES.search(pattern)
    if not found:
        yield pattern
        return
    first, last, words = found.groups()
    if words is None:
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        padded = any(re.match(r"-?0\d", end) for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        choices: Iterable[str] = (f"{n:0{width}d}" for n in islice(numbers, LIMIT + 1))
    else:
        choices = words.split(",")
    for word in choices:
        yield from _braces(pattern[: found.start()] + word + pattern[found.end() :])


def _split(spec: str) -> list[str]:
    """The parts between commas that are not inside braces."""
    depth, part, found = 0, "", []
    if spec.count("{") != spec.count("}"):
        return [each.strip() for each in spec.split(",") if each.strip()]
    for letter in spec:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth <= 0:
            found.append(part)
            part = ""
        else:
            part += letter
    return [each.strip() for each in (*found, part) if each.strip()]


def _refuse_url(spec: str) -> None:
    """Raise ValueError for a URL, which webdataset would fetch."""
    found = URL.match(spec)
    if found and found[1].lower() != "file" and not exists(spec):
        raise ValueError(
            f"images {spec!r} are not on this machine: {found[0]} is not read; copy them to a"
            " folder, or mount it"
        )


def _local(part: str) -> str:
    """A part of a mixture without `file:`."""
    _refuse_url(part)
    return re.sub(r"^file:(//(localhost)?(?=/))?", "", part, flags=re.I)


def _weighed(part: str) -> WeightedPath:
    """Parse one source of a mixture, `PATH` or `PATH=WEIGHT`."""
    path, equals, weight = part.rpartition("=")
    if not equals or exists(part):
        return WeightedPath(Path(part), 1.0)
    try:
        times = float(weight)
    except ValueError:
        return WeightedPath(Path(part), 1.0)
    if not 0 < times <= 1000:
        raise ValueError(f"the weight of {path!r} is {weight}; give one above 0 and at most 1000")
    return WeightedPath(Path(path), times)
