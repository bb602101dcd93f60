"""Features on disk, by the model's weights, the images, their preprocessing and their size.

A folder per model and image set holds parts, safetensors files of places and features. Ranks write
them as they go, each under a name of its own, so an evaluation that was killed goes on from them on
any number of ranks. A part appears by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import dist
from unic_ds.evaluate.extraction import FeatureFile
from unic_ds.evaluate.features import ImageSet, Model
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.files import nearest_existing, tensor_files, write_atomic
from unic_ds.files.printable import printable
from unic_ds.process import console

VERSION = "1"
ABOUT = "about.json"
REMEDY = "give --eval.cache another folder, or none"
FLUSH_S = 20.0
"""Seconds after which a rank writes the features that it has."""
FLUSH_BYTES = 2**27


class CachedFeatures:
    """Parts in one folder (`extraction.FeatureFile`)."""

    def __init__(self, folder: Path, count: int):
        """`count` images; errors as `load`."""
        self.folder, self.count = folder, count
        self.added: list[tuple[Tensor, Tensor]] = []
        self.last = time.monotonic()
        self.load()

    def load(self) -> None:
        """Find the parts on disk. ValueError for a part of other images."""
        self.parts = list(filter(None, map(opened, sorted(self.folder.glob("*.safetensors")))))
        self.state_N = np.zeros(self.count, dtype=np.int8)
        self.part_N = np.full(self.count, -1)
        self.row_N = np.zeros(self.count, dtype=np.int64)
        for number, part in enumerate(self.parts):
            if "unreadable" in part:
                place_M = self._checked(part["unreadable"])
                self.state_N[place_M[self.state_N[place_M] == 0]] = -1
                continue
            place_R = self._checked(part["place"])
            if len(place_R) != len(part["cls"]):
                raise ValueError(self._foreign())
            self.state_N[place_R] = 1
            self.part_N[place_R], self.row_N[place_R] = number, np.arange(len(place_R))

    def agree(self) -> None:
        """Take the state that rank 0 has found: another's may lack the newest parts yet."""
        self.state_N = dist.broadcast_object(self.state_N)

    def _checked(self, place_R: Tensor) -> NDArray[np.int64]:
        """Places of a part."""
        found = place_R.numpy()
        if place_R.dtype != torch.int64 or (len(found) and not 0 <= found.min() <= found.max()):
            raise ValueError(self._foreign())
        if len(found) and found.max() >= self.count:
            raise ValueError(self._foreign())
        return found

    def _foreign(self) -> str:
        return f"{str(self.folder)!r} holds features of other images; delete it"

    def state(self) -> NDArray[np.int8]:
        """State of each image (N): 0 missing, 1 stored, -1 unreadable."""
        return self.state_N

    def add(self, place_R: Tensor, row_RC: Tensor) -> None:
        """Add features of images; they are written every 20 s and at 128 MB."""
        if len(place_R):
            self.added.append((place_R, row_RC))
        size = sum(row.nbytes for _, row in self.added)
        if time.monotonic() - self.last > FLUSH_S or size > FLUSH_BYTES:
            self._write()

    def _write(self) -> None:
        """Write what was added as a part."""
        if self.added:
            place_R, row_RC = map(torch.cat, zip(*self.added, strict=True))
            tensors = {"place": place_R.contiguous(), "cls": row_RC.float().contiguous()}
            self._save(tensors)
        self.added, self.last = [], time.monotonic()

    def _save(self, tensors: dict[str, Tensor]) -> None:
        part = self.folder / f"{os.urandom(8).hex()}.part"
        tensor_files.save(tensors, part)
        part.rename(part.with_suffix(".safetensors"))

    def flush(self, unreadable_M: NDArray[np.int64]) -> None:
        """Write what was added, and on rank 0 the places of images that no rank could read."""
        # `load` finds them, after all ranks have written theirs.
        self._write()
        unreadable_M = unreadable_M[self.state_N[unreadable_M] == 0]  # not yet known
        if len(unreadable_M) and dist.rank() == 0:
            self._save({"unreadable": torch.from_numpy(unreadable_M.astype(np.int64))})

    def rows(self, place_R: Tensor) -> Tensor:
        """Stored fp32 features (R, C) of images."""
        places = place_R.numpy()
        if not (self.part_N[places] >= 0).all():
            raise OSError(
                f"{str(self.folder)!r} lacks parts that rank 0 has found; the cache must be on a"
                " file system that all ranks share"
            )
        width = next(part["cls"].shape[1] for part in self.parts if "cls" in part)
        row_RC = torch.empty(len(places), width)
        for number in np.unique(self.part_N[places]):
            here = torch.from_numpy(np.flatnonzero(self.part_N[places] == number))
            row_RC[here] = self.parts[number]["cls"][self.row_N[places[here]]]
        return row_RC


def opened(file: Path) -> tensor_files.Safetensors | None:
    """A part; None, with a line, for one that is damaged: its features are computed again."""
    try:
        return tensor_files.Safetensors(file)
    except ValueError as error:
        console.say(f"feature cache: {error}; its features are computed again")
        return None


class FeatureCache:
    """A folder of features (`extraction.FeatureStore`)."""

    def __init__(self, root: Path):
        self.root = root

    def open(self, models: Sequence[Model], images: ImageSet) -> dict[str, FeatureFile]:
        """The features of each model on the images; prints the size of those that are missing.

        Models and images without an identity are not kept. RuntimeError, on every rank, if the
        folder cannot be used on one, or its disk lacks room.
        """
        known = [model for model in models if model.identity]
        if not known or not images.identity:
            return {}
        with raised_on_all_ranks("opening the feature cache", REMEDY):
            found = {model.name: self.file_of(model, images) for model in known}
        for file in found.values():
            file.agree()
        with raised_on_all_ranks("the width of a model's features", "lower --eval.size"):
            missing = {model: int((found[model.name].state() == 0).sum()) for model in known}
            sizes = [4 * count * self.width(model) for model, count in missing.items() if count]
            self.check_room(sum(sizes))
        if sizes:
            console.say(
                f"features of {len(sizes)} models on {len(images)} images of"
                f" {printable(images.name)} to be cached: {sum(sizes) / 1e6:.1f} MB in {self.root}"
            )
        dist.barrier()  # no rank writes before all have read
        return dict(found)

    def file_of(self, model: Model, images: ImageSet) -> CachedFeatures:
        """The features of a model, as this rank finds them on disk."""
        folder = self.root / self.key(model, images)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / ABOUT).exists():
                self.describe(folder, model, images)
        except OSError as error:
            raise ValueError(
                f"the feature cache {str(folder)!r} cannot be written ({error.strerror}); {REMEDY}"
            ) from None
        return CachedFeatures(folder, len(images))

    @staticmethod
    def key(model: Model, images: ImageSet) -> str:
        """Name of the folder: a hash of all that the features depend on."""
        facts = (VERSION, model.identity, str(model.size), images.identity)
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]

    @staticmethod
    def width(model: Model) -> int:
        """Channels of a model's features, from a black image."""
        image_B3HW = torch.zeros(1, 3, model.size, model.size, dtype=torch.uint8)
        found = model.encode(image_B3HW.to(dist.device()), frozenset({"cls"})).cls_BC
        assert found is not None
        return found.shape[1]

    @staticmethod
    def describe(folder: Path, model: Model, images: ImageSet) -> None:
        """Write what the folder holds, for a reader who wants to delete it."""
        facts = {"model": model.name, "size": model.size, "images": images.name}
        if dist.rank() == 0:
            write_atomic(folder / ABOUT, json.dumps(facts | {"count": len(images)}))

    def check_room(self, size: int) -> None:
        """Raise ValueError unless the disk has room for `size` bytes."""
        free = shutil.disk_usage(nearest_existing(self.root)).free
        if size > free:
            raise ValueError(
                f"the feature cache {str(self.root)!r} needs {size / 1e9:.1f} GB, but its disk has"
                f" {free / 1e9:.1f} GB free; {REMEDY}"
            )
