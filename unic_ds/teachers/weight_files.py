"""Weight files of teachers: their hashes, and checks of what they hold before it is used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from unic_ds.config import Teacher
from unic_ds.files import sha256, tensor_files
from unic_ds.files.printable import printable

HASHES = ("sha256", "content")
"""Keys of the hashes of weights, in teachers.json and feature caches."""


def hashes(path: Path) -> dict[str, str]:
    """Hex SHA-256 of a weight file (`sha256`) and of its tensors (`content`).

    `content` is what identifies weights: a file may be written anew, or converted. It is missing
    for files that only a model's own code reads. ValueError for anything but a regular file.
    """
    try:
        stat = path.stat()
        return dict(_hashes(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns)))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror})") from None


@lru_cache(maxsize=64)
def _hashes(path: Path, _version: tuple[int, ...]) -> dict[str, str]:
    """`hashes` of a file; its version changes whenever the file does."""
    with ThreadPoolExecutor(1) as executor:  # hashlib releases the interpreter's lock
        digest_of_file = executor.submit(sha256, path)
        try:
            tensors = {k: v for k, v in state_of(path).items() if isinstance(v, Tensor)}
            found = {} if foreign(tensors) else {"content": tensor_files.content(tensors)}
        except ValueError:
            found = {}
        return {"sha256": digest_of_file.result()} | found


def module_hashes(module: nn.Module) -> dict[str, str]:
    """`hashes` of a module's parameters and buffers, for a teacher that has no file."""
    state = module.state_dict()
    return {"sha256": digest(state), "content": tensor_files.content(state)}


def digest(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names and bytes, which identifies a module in older runs."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(name.encode())
        total.update(tensor_files.raw_bytes(value.detach()))
    return total.hexdigest()


def known_by(hashed: Mapping[str, Any]) -> str:
    """The identity of weights: the hash of their content if known, else that of their file."""
    return hashed.get("content") or hashed["sha256"]


def same(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """True if two `hashes` are of the same weights; older versions recorded the file's alone."""
    if theirs.get("content") and ours.get("content"):
        return theirs["content"] == ours["content"]
    return theirs.get("sha256") == ours.get("sha256")


NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""Keys of a torch file that hold the state dict, in timm's order."""


def state_of(path: Path) -> Mapping[str, Any]:
    """The state dict in a weight file, under the names that timm gives it; mapped, not read.

    ValueError for what is no such file, or claims more than it holds. Of torch files any values
    are returned, of safetensors tensors.
    """
    if path.suffix == ".safetensors":
        return tensor_files.Safetensors(path)
    found = tensor_files.unpickle(path)
    for _ in range(len(NESTS)):
        inner = (found.get(key) for key in NESTS) if isinstance(found, dict) else ()
        found = next((value for value in inner if isinstance(value, dict)), found)
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds no state dict but a {type(found).__name__}")
    if odd := [key for key in found if not isinstance(key, str)]:
        raise ValueError(f"{str(path)!r} has a name that is no text: {printable(odd[0])}")
    tensor_files.refuse_many(path, len(found))
    tensor_files.refuse_oversized(path, (v for v in found.values() if isinstance(v, Tensor)))
    return clean_state_dict(found)


def foreign(state: Mapping[str, Any]) -> str:
    """The first value that is no plain tensor of a type that weights have, in words; or nothing."""
    reasons = ((name, tensor_files.unlike_weights(value)) for name, value in state.items())
    return next((f"{printable(name)} {why}" for name, why in reasons if why), "")


PATCH_LIMIT = 64
FLOATING = re.compile(r"(^|[._])(weight|bias|gamma|token|embed|embedding|running_(mean|var))$")
"""Names of tensors that are floating in every model."""


def integers(state: Mapping[str, Tensor], arch: str) -> str:
    """The first tensor that is not floating but is in the timm model `arch`, in words.

    Counters, indices and masks are no weights.
    """
    found = [
        name
        for name, value in state.items()
        if not value.is_floating_point() and not name.endswith(".num_batches_tracked")
    ]
    if not found:
        return ""
    with torch.device("meta"):
        model = timm.create_model(arch, pretrained=False).state_dict() if arch else {}
    floats = {name for name, value in model.items() if value.is_floating_point()}
    wrong = (name for name in found if name in floats or FLOATING.search(name))
    return next((f"{printable(n)} {tensor_files.not_floating(state[n])}" for n in wrong), "")


def patches(state: Mapping[str, Tensor]) -> str:
    """The first patch embedding of odd sides, in words: timm resamples it at their fourth power."""
    for name, value in state.items():
        sides = value.shape[2:] if name.endswith("patch_embed.proj.weight") else ()
        if any(not 0 < side <= PATCH_LIMIT for side in sides):
            return f"{printable(name)} has sides {tuple(sides)}, not 1 to {PATCH_LIMIT} px"
    return ""


def check(row: Teacher, path: Path, arch: str) -> None:
    """ValueError if a published file holds something other than weights of the timm model `arch`.

    An empty `arch` is none of timm's. NumPy's files, which only timm or open_clip can read, are
    left to them.
    """
    if path.suffix in (".npz", ".npy"):
        return
    try:
        state = {k: v for k, v in state_of(path).items() if isinstance(v, Tensor)}
        if wrong := foreign(state) or integers(state, arch):
            raise ValueError(f"{str(path)!r} holds no weights: {wrong}")
    except ValueError as error:
        raise ValueError(f"teacher {row.name!r}: {error}") from None


def refuse_not_finite(row: Teacher, tower: nn.Module, *, buffers: bool) -> None:
    """ValueError, naming the first, for weights that are not finite.

    `buffers` are checked too; those of a user's module may be masks.
    """
    values = tower.state_dict().items() if buffers else tower.named_parameters()
    for name, value in values:
        plain = not tensor_files.unlike_weights(value) and value.is_floating_point()
        if plain and not tensor_files.is_finite(value):
            raise ValueError(
                f"teacher {row.name!r}: its weights {printable(name.removeprefix('model.'))} are"
                " not finite; take another file"
            )
