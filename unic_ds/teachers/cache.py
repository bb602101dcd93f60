"""Cache on disk of the teachers' features of augmented views, for training without the teachers.

A folder holds `manifest.json` and, for each teacher, `TEACHER/view_V_chunk_K.bin`: the tokens of
neighbouring samples under one view, before standardisation, [samples, 1 + N, C] with CLS first, as
bf16, or as int8 after an fp32 scale per kind and channel [2, C] (the chunk's largest magnitude is
127). A file is written under another name and renamed when complete, so a build that was stopped
goes on. The manifest identifies images, augmentation and teachers; a run that differs is refused.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray

from unic_ds import config, dist, files
from unic_ds.files import open_atomic
from unic_ds.files.printable import printable
from unic_ds.teachers import sources, weight_files
from unic_ds.teachers.teacher import TeacherFacts
from unic_ds.teachers.token_codec import decode, encode
from unic_ds.tokens import Tokens

MANIFEST = "manifest.json"
BYTES = {"bf16": 2, "int8": 1}
CHUNK = 128  # samples of a file
READERS, BATCH = 16, 4096
"""Threads that look at files, and files that they are given at a time."""
LARGEST = {"samples": 1 << 40, "views": 1 << 20, "tokens": 1 << 20, "chunk": 1 << 20}
WIDEST = 1 << 20
"""Channels of a teacher, at most."""
HIGHEST = 1 << 10
"""Side of a teacher's grid, at most."""


class CacheManifest(TypedDict):
    """Contents of manifest.json."""

    format: int
    whole: bool  # every file is written
    seed: int
    views: int
    samples: int
    tokens: int  # patch tokens of a sample, on the student's grid
    chunk: int  # samples of a file
    dtype: str
    draws: dict[str, object]  # what images and augmentation depend on
    teachers: dict[str, TeacherFacts]


@dataclass(frozen=True)
class Layout:
    """Number and type of the cached features, and the files that hold them."""

    folder: Path
    samples: int
    views: int
    tokens: int  # patch tokens of a sample, on the student's grid
    widths: Mapping[str, int]
    dtype: str
    chunk: int = CHUNK
    larger: Mapping[str, int] = field(default_factory=dict)  # tokens of teachers on larger grids

    def tokens_of(self, name: str) -> int:
        """Patch tokens of a sample, of one teacher."""
        return self.larger.get(name, self.tokens)

    def spans(self) -> Iterator[range]:
        """The samples of each file of one view."""
        for first in range(0, self.samples, self.chunk):
            yield range(first, min(first + self.chunk, self.samples))

    def parts(self) -> Iterator[tuple[int, range]]:
        """(view, samples) of each file of one teacher."""
        return ((view, span) for view in range(self.views) for span in self.spans())

    def missing(self) -> list[tuple[int, range]]:
        """(view, samples) of files that are missing or incomplete for some teacher."""
        return [part for part in self.parts() if not self.written(*part)]

    def broken(self, names: Iterable[str]) -> Path | None:
        """The first file of these teachers that is missing, not regular or of another size."""
        wanted = (
            (self.path(name, view, span[0] // self.chunk), self.size(name, len(span)))
            for name in names
            for view, span in self.parts()
        )
        with ThreadPoolExecutor(READERS) as readers:  # a file server is slow
            while batch := list(islice(wanted, BATCH)):
                for (path, _), whole in zip(batch, readers.map(is_whole, batch), strict=True):
                    if not whole:
                        return path
        return None

    def path(self, name: str, view: int, chunk: int) -> Path:
        return self.folder / name / f"view_{view:03d}_chunk_{chunk:06d}.bin"

    def size(self, name: str, samples: int) -> int:
        """Bytes of a file with so many samples."""
        width = self.widths[name]
        scale = 2 * width * 4 if self.dtype == "int8" else 0
        return scale + samples * (1 + self.tokens_of(name)) * width * BYTES[self.dtype]

    def total(self) -> int:
        """Bytes of all files."""
        full, rest = divmod(self.samples, self.chunk)
        view = sum(
            full * self.size(name, self.chunk) + (self.size(name, rest) if rest else 0)
            for name in self.widths
        )
        return self.views * view

    def written(self, view: int, span: range) -> bool:
        """True if the files of these samples are complete for every teacher."""
        return all(
            is_whole((self.path(name, view, span[0] // self.chunk), self.size(name, len(span))))
            for name in self.widths
        )

    def write(self, name: str, view: int, span: range, parts: Sequence[Tokens]) -> None:
        """Write a teacher's file from its tokens of the samples in order."""
        cls_BC = torch.cat([tokens.cls_BC for tokens in parts])
        patch_BNC = torch.cat([tokens.patch_BNC for tokens in parts])
        x_BNC = torch.cat([cls_BC[:, None], patch_BNC], 1).cpu()
        assert x_BNC.shape == (len(span), 1 + self.tokens_of(name), self.widths[name])
        path = self.path(name, view, span[0] // self.chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path, sync=False) as file:
            for block in encode(x_BNC, self.dtype):
                file.write(block.tobytes())

    def read(
        self,
        name: str,
        index_B: NDArray[np.int64],
        view_B: NDArray[np.int64],
        readers: Executor,
        *,
        pin: bool = False,
    ) -> Callable[[], Tokens]:
        """Start reading a teacher's tokens of samples under views; the result waits for them.

        They are bf16 on the CPU, with `pin` in page-locked memory, which a GPU copies from while
        the host goes on. The result raises RuntimeError for a file that cannot be read.
        """
        count, width, patches = len(index_B), self.widths[name], self.tokens_of(name)
        cls_BC = torch.empty(count, width, dtype=torch.bfloat16, pin_memory=pin)
        patch_BNC = torch.empty(count, patches, width, dtype=torch.bfloat16, pin_memory=pin)
        tokens = Tokens(cls_BC, patch_BNC)
        raw = (cls_BC.view(torch.int16), patch_BNC.view(torch.int16))
        if scaled := self.dtype == "int8":
            whole_BNC = torch.empty(count, 1 + patches, width, dtype=torch.int8)
            raw = (torch.empty(count, 2, width), whole_BNC)
        parts = [x.numpy() for x in raw]
        jobs = [
            readers.submit(self.fill, name, index, view, [part[b] for part in parts])
            for b, (index, view) in enumerate(zip(index_B.tolist(), view_B.tolist(), strict=True))
        ]

        def wait() -> Tokens:
            for job in jobs:
                job.result()
            if scaled:
                decode(*raw, tokens)
            return tokens

        return wait

    def fill(self, name: str, index: int, view: int, parts: Sequence[NDArray[Any]]) -> None:
        """Read a sample's CLS and patch tokens in bf16, or its file's scales and its int8 tokens.

        RuntimeError for a file that cannot be read or has another size than it should.
        """
        chunk, row = divmod(index, self.chunk)
        path = self.path(name, view, chunk)
        size = self.size(name, min(self.chunk, self.samples - chunk * self.chunk))
        at = self.size(name, row)
        places = (0, at) if self.dtype == "int8" else (at, at + parts[0].nbytes)
        try:
            with files.open_regular(path) as file:
                whole = os.fstat(file.fileno()).st_size == size
                for offset, part in zip(places, parts, strict=True):
                    whole = whole and files.read_into(file, offset, part.data)
        except OSError as error:
            raise RuntimeError(
                f"{str(path)!r} cannot be read ({error.strerror}); bring it back and resume, or"
                " make the cache again"
            ) from None
        if not whole:
            raise RuntimeError(f"{str(path)!r} was cut off; make the cache again")


def is_whole(wanted: tuple[Path, int]) -> bool:
    """True if a path is a regular file, not a link, of so many bytes."""
    path, size = wanted
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


class FeatureCache:
    """A finished cache; ValueError if `folder` holds none, or one with other `draws`.

    `draws` is what images and augmentation depend on; `rows` are the run's teachers, of which those
    that the cache has by name are read from it. All ranks construct it together: rank 0 hashes
    weights and checks every file.
    """

    def __init__(
        self,
        folder: str,
        rows: tuple[config.Teacher, ...],
        draws: Mapping[str, Any],
        *,
        samples: int,
    ):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None or manifest.get("whole") is False:
            what = "is not finished" if manifest else f"holds no {MANIFEST}"
            raise ValueError(
                f"--teachers.cache {folder!r} {what}; run `unic-ds cache {folder}` with the same"
                " recipe"
            )
        check_manifest(self.folder, manifest)
        ours = {"samples": samples, "tokens": draws["grid"] ** 2}
        refuse_others(folder, manifest["draws"], draws)
        refuse_others(folder, manifest, ours)
        cached = [row for row in rows if row.name in manifest["teachers"]]
        if not cached:
            has = printable(", ".join(manifest["teachers"]))
            raise ValueError(
                f"--teachers.cache {folder!r} has {has}, none of which is a teacher of this run;"
                " name the teachers as there, or drop the option"
            )
        self.seed, self.views = manifest["seed"], manifest["views"]
        self.layout = layout_of(self.folder, manifest)
        self.facts = dist.on_rank_0(lambda: self.compare(cached, manifest))
        self.identity = {"views": self.views, "seed": self.seed, "dtype": self.layout.dtype}
        self.identity["teachers"] = list(self.facts)

    def compare(
        self, rows: Sequence[config.Teacher], manifest: CacheManifest
    ) -> dict[str, TeacherFacts]:
        """Facts of each cached teacher; ValueError if it is another, or its files are broken."""
        facts: dict[str, TeacherFacts] = {}
        for row in rows:
            theirs = with_defaults(row.name, manifest["teachers"][row.name])
            ours: dict[str, str | int] = {**own_facts(row)}
            ours |= sources.architecture_facts(row, math.isqrt(self.layout.tokens))
            refuse_others(f"{str(self.folder)!r} ({row.name})", theirs, ours)
            hashes = {k: ours[k] for k in weight_files.HASHES if k in ours}
            facts[row.name] = cast(TeacherFacts, {**manifest["teachers"][row.name], **hashes})
        if path := self.layout.broken(facts):
            raise ValueError(
                f"the feature cache is incomplete: {str(path)!r} is missing, no regular file or of"
                " another size; make it again"
            )
        return facts

    def read(
        self,
        index_B: NDArray[np.int64],
        view_B: NDArray[np.int64],
        readers: Executor,
        *,
        pin: bool = False,
    ) -> Callable[[], dict[str, Tokens]]:
        """Start reading the tokens of each cached teacher of this run; as `Layout.read`."""
        started = {
            name: self.layout.read(name, index_B, view_B, readers, pin=pin) for name in self.facts
        }
        return lambda: {name: wait() for name, wait in started.items()}


def read_manifest(folder: Path) -> CacheManifest | None:
    """The manifest of a cache, if there is one; ValueError for one that is not of this version.

    Its values are unchecked until `check_manifest`.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    try:
        found = json.loads(files.read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise other_version(folder, getattr(error, "strerror", None) or error) from None
    if not isinstance(found, dict) or found.get("format") != 1:
        raise other_version(folder, "format must be 1")
    if not isinstance(found.get("teachers"), dict):
        raise other_version(folder, "teachers must be a dict")
    for name in found["teachers"]:
        if not config.TEACHER_NAME.fullmatch(name):
            raise other_version(folder, f"{printable(name)} is no teacher's name")
    return cast(CacheManifest, found)


def other_version(folder: Path, why: object) -> ValueError:
    """The error for a manifest that cannot be used."""
    return ValueError(
        f"{str(folder / MANIFEST)!r} is no feature cache's manifest of this version"
        f" ({printable(why)}); make the cache again"
    )


def check_manifest(folder: Path, manifest: CacheManifest) -> None:
    """ValueError for the first value of a manifest that is missing or out of range."""
    kinds = {"whole": bool, "dtype": str, "draws": dict}
    wrong = [
        f"{key} must be an integer of 1 to {most}"
        for key, most in LARGEST.items()
        if not is_count(manifest.get(key), most)
    ]
    if not is_count(manifest.get("seed"), 2**64 - 1, least=0):
        wrong.append("seed must be an integer of 64 bits")
    wrong += [
        f"{key} must be a {kind.__name__}"
        for key, kind in kinds.items()
        if not isinstance(manifest.get(key), kind)
    ]
    if not wrong and manifest["dtype"] not in BYTES:
        wrong.append(f"dtype must be one of {', '.join(BYTES)}")
    for name, row in manifest["teachers"].items():
        sizes = ("width", "size")
        if not isinstance(row, dict) or not all(is_count(row.get(k), WIDEST) for k in sizes):
            wrong.append(f"{name} must have a width and a size of 1 to {WIDEST}")
        elif not is_count(row.get("grid", 1), HIGHEST):
            wrong.append(f"{name} must have a grid of 1 to {HIGHEST}")
        elif not all(isinstance(row.get(key), str) for key in ("source", "sha256")):
            wrong.append(f"{name} must have source and sha256 as text")
    if wrong:
        raise other_version(folder, wrong[0])


def is_count(value: object, most: int, *, least: int = 1) -> bool:
    """True if a value is an integer within bounds."""
    return type(value) is int and least <= value <= most


def layout_of(folder: Path, manifest: Mapping[str, Any]) -> Layout:
    """The layout that a manifest describes."""
    return Layout(
        folder,
        samples=manifest["samples"],
        views=manifest["views"],
        tokens=manifest["tokens"],
        widths={name: row["width"] for name, row in manifest["teachers"].items()},
        dtype=manifest["dtype"],
        chunk=manifest["chunk"],
        larger={
            name: row["grid"] ** 2
            for name, row in manifest["teachers"].items()
            if row.get("grid", 0) ** 2 > manifest["tokens"]
        },
    )


def own_facts(row: config.Teacher) -> dict[str, str]:
    """This run's options of a cached teacher, and its hashes if its weights are here."""
    keys = ("size", "resize", "patch", "mean", "std", "block", "precision")
    facts = {f"teachers.{row.name}.{key}": json.dumps(getattr(row, key)) for key in keys}
    try:
        path = sources.locate(row)
    except ValueError:
        path = None
    # A file may move; weights that have none, or are not here, are identified by their source.
    return facts | (weight_files.hashes(path) if path else {"source": row.source})


def refuse_others(where: str, theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    """ValueError, naming the first, if one of `ours` differs; `weight_files.same` judges hashes."""
    for key in ours:
        same = theirs.get(key) == ours[key]
        if key in weight_files.HASHES:
            same = weight_files.same(theirs, ours)
        if not same:
            raise ValueError(
                f"the feature cache {where} was made with {key} {printable(repr(theirs.get(key)))},"
                f" this run has {ours[key]!r}; use that, or make another cache"
            )


def with_defaults(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's facts with the defaults of options that caches of older versions lack."""
    return {f"teachers.{name}.resize": json.dumps("image"), **row}


def without_weights(name: str, row: Mapping[str, object]) -> dict[str, object]:
    """A teacher's facts except the hashes and the source of its weights, which may move."""
    facts, of_weights = with_defaults(name, row), (*weight_files.HASHES, "source")
    return {key: value for key, value in facts.items() if key not in of_weights}


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Keys other than `whole` in which two manifests differ; `weight_files.same` judges hashes."""
    keys = [key for key in ours if key not in ("whole", "teachers")]
    other = [key for key in keys if theirs.get(key) != ours[key]]
    there, here = theirs["teachers"], ours["teachers"]
    same = there.keys() == here.keys() and all(
        without_weights(name, there[name]) == without_weights(name, row)
        and weight_files.same(there[name], row)
        for name, row in here.items()
    )
    return other if same else [*other, "teachers"]
