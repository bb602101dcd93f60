"""Teachers' features of drawn views on disk: for training that need not run them again.

A folder holds `manifest.json` and, for each teacher, `TEACHER/view_V_chunk_K.bin`: the raw tokens
of neighbouring samples under one view, [samples, 1 + N, C] with CLS first, as bf16, or as int8
after an fp32 scale per kind and channel [2, C] (the chunk's largest magnitude is 127). A file is
written under another name and renamed when whole, so what stands there is good and a build that was
stopped goes on. The manifest says what the features are of; a run that differs in it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import config
from unic_ds.files import replacing
from unic_ds.teachers import weights
from unic_ds.tokens import Tokens

MANIFEST = "manifest.json"
BYTES = {"bf16": 2, "int8": 1}
CHUNK = 128  # samples of a file
OPEN = 512  # files kept mapped


@dataclass(frozen=True)
class Layout:
    """How many features there are, and where each lies."""

    folder: Path
    samples: int
    views: int
    tokens: int  # patch tokens of a sample
    widths: Mapping[str, int]
    dtype: str
    chunk: int = CHUNK

    @property
    def spans(self) -> list[range]:
        """The samples of each file of one view."""
        firsts = range(0, self.samples, self.chunk)
        return [range(first, min(first + self.chunk, self.samples)) for first in firsts]

    def missing(self) -> list[tuple[int, range]]:
        """(view, samples) of what some teacher has no whole file of."""
        parts = ((view, span) for view in range(self.views) for span in self.spans)
        return [part for part in parts if not self.written(*part)]

    def path(self, name: str, view: int, chunk: int) -> Path:
        return self.folder / name / f"view_{view:03d}_chunk_{chunk:06d}.bin"

    def size(self, name: str, samples: int) -> int:
        """Bytes of a file with so many samples."""
        width = self.widths[name]
        scale = 2 * width * 4 if self.dtype == "int8" else 0
        return scale + samples * (1 + self.tokens) * width * BYTES[self.dtype]

    def total(self) -> int:
        """Bytes of all files."""
        view = sum(self.size(name, len(span)) for name in self.widths for span in self.spans)
        return self.views * view

    def written(self, view: int, span: range) -> bool:
        """Whether every teacher's file of these samples is there, whole."""
        paths = {name: self.path(name, view, span[0] // self.chunk) for name in self.widths}
        return all(
            path.is_file() and path.stat().st_size == self.size(name, len(span))
            for name, path in paths.items()
        )

    def write(self, name: str, view: int, span: range, parts: Sequence[Tokens]) -> None:
        """Write a teacher's file from its tokens of the samples in order."""
        cls_BC = torch.cat([tokens.cls_BC for tokens in parts])
        patch_BNC = torch.cat([tokens.patch_BNC for tokens in parts])
        x_BNC = torch.cat([cls_BC[:, None], patch_BNC], 1).cpu()
        assert x_BNC.shape == (len(span), 1 + self.tokens, self.widths[name])
        path = self.path(name, view, span[0] // self.chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=False) as file:
            for block in encode(x_BNC, self.dtype):
                file.write(block.tobytes())

    def read(self, name: str, index_B: NDArray[np.int64], view_B: NDArray[np.int64]) -> Tokens:
        """A teacher's tokens of samples under views, in bf16 on the CPU."""
        rows = []
        for index, view in zip(index_B.tolist(), view_B.tolist(), strict=True):
            chunk, row = divmod(index, self.chunk)
            path = self.path(name, view, chunk)
            samples = min(self.chunk, self.samples - chunk * self.chunk)
            if mapped(path).size != self.size(name, samples):
                raise RuntimeError(f"{str(path)!r} was cut off; make the cache again")
            rows.append(decode(mapped(path), row, self.widths[name], samples, self.dtype))
        x_BNC = torch.stack(rows)
        return Tokens(x_BNC[:, 0], x_BNC[:, 1:])


@lru_cache(maxsize=OPEN)
def mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, read as they are asked for."""
    return np.memmap(path, np.uint8, "r")


def encode(x_BNC: Tensor, dtype: str) -> list[NDArray[Any]]:
    """A file's blocks: tokens, after their scales where they are int8."""
    if dtype == "bf16":
        return [x_BNC.bfloat16().contiguous().view(torch.int16).numpy()]
    x_BNC = x_BNC.float()
    parts = (x_BNC[:, :1], x_BNC[:, 1:])
    scale_2C = torch.stack([part.abs().amax((0, 1)) for part in parts]) / 127
    # A channel of zeros has no scale; one that is not finite stays so, for the step to see it.
    scale_2C = torch.where(scale_2C == 0, 1.0, scale_2C)
    whole = [part / scale_C for part, scale_C in zip(parts, scale_2C, strict=True)]
    return [scale_2C.numpy(), torch.cat(whole, 1).round().to(torch.int8).numpy()]


def decode(data: NDArray[np.uint8], row: int, width: int, samples: int, dtype: str) -> Tensor:
    """The tokens [1 + N, C] of one sample of a file, in bf16."""
    if dtype == "bf16":
        length = data.size // samples
        raw = np.array(data[row * length : (row + 1) * length])
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).unflatten(0, (-1, width))
    head = 2 * width * 4
    length = (data.size - head) // samples
    scale_2C = torch.from_numpy(np.array(data[:head]).view(np.float32)).view(2, width)
    raw = np.array(data[head + row * length : head + (row + 1) * length])
    x_NC = torch.from_numpy(raw.view(np.int8)).view(-1, width).float()
    return torch.cat([x_NC[:1] * scale_2C[0], x_NC[1:] * scale_2C[1]]).bfloat16()


class FeatureCache:
    """A finished cache; ValueError where `folder` holds none, or `draws` are not its draws.

    `draws` is what its samples and their augmentation depend on; `rows` are the run's teachers, of
    which those that the cache has by name are read from it.
    """

    def __init__(self, folder: str, rows: tuple[config.Teacher, ...], draws: Mapping[str, Any]):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None or not manifest["whole"]:
            what = "is not finished" if manifest else f"holds no {MANIFEST}"
            raise ValueError(
                f"--teachers.cache {folder!r} {what}; run `unic-ds cache {folder}` with the same"
                " recipe"
            )
        refuse_others(folder, manifest["draws"], draws)
        self.seed, self.views = int(manifest["seed"]), int(manifest["views"])
        self.facts: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row.name in manifest["teachers"]:
                self.facts[row.name] = manifest["teachers"][row.name]
                refuse_others(f"{folder}: {row.name}", self.facts[row.name], own_facts(row))
        if not self.facts:
            has = ", ".join(manifest["teachers"])
            raise ValueError(
                f"--teachers.cache {folder!r} has {has}, none of which is a teacher of this run;"
                " name the teachers as there, or drop the option"
            )
        self.layout = layout_of(self.folder, manifest)
        self.identity = {"views": self.views, "seed": self.seed, "dtype": self.layout.dtype}
        self.identity["teachers"] = list(self.facts)

    def read(self, index_B: NDArray[np.int64], view_B: NDArray[np.int64]) -> dict[str, Tokens]:
        """Tokens of each cached teacher of this run, in bf16 on the CPU."""
        return {name: self.layout.read(name, index_B, view_B) for name in self.facts}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a cache, if there is one; ValueError for one that cannot be read."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        assert found["format"] == 1
        return found
    except (ValueError, KeyError, AssertionError, TypeError):
        raise ValueError(f"{str(file)!r} is no feature cache's manifest of this version") from None


def layout_of(folder: Path, manifest: Mapping[str, Any]) -> Layout:
    """The layout that a manifest describes."""
    widths = {name: int(row["width"]) for name, row in manifest["teachers"].items()}
    numbers = {key: int(manifest[key]) for key in ("samples", "views", "tokens", "chunk")}
    return Layout(folder, widths=widths, dtype=manifest["dtype"], **numbers)


def own_facts(row: config.Teacher) -> dict[str, Any]:
    """What this run says of a cached teacher; its weights count where they are on this machine."""
    keys = ("size", "patch", "mean", "std", "block", "precision")
    facts = {f"teachers.{row.name}.{key}": json.dumps(getattr(row, key)) for key in keys}
    try:
        path = weights.locate(row)
    except ValueError:
        path = None
    # A file may move; what is not a file, or not here, is known by its name.
    return facts | ({"sha256": weights.sha256(path)} if path else {"source": row.source})


def refuse_others(where: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """ValueError, naming the first, where something that both state differs."""
    for key in ours:
        if theirs.get(key) != ours[key]:
            raise ValueError(
                f"the feature cache {where} was made with {key} {theirs.get(key)!r}, this run has"
                f" {ours[key]!r}; use that, or make another cache"
            )
