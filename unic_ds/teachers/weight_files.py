"""Where a teacher's weights lie: fetched on a login node, found offline on the rest.

Hub files are read and written through huggingface_hub's own cache, url files through that of timm
or open_clip, so that what other programs downloaded is found too. Set HF_HUB_OFFLINE before
importing this, not after.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from timm.models import clean_state_dict
from torch import Tensor, nn

from unic_ds.config import Teacher
from unic_ds.config.overrides import nearest
from unic_ds.files import open_regular, tensor_files
from unic_ds.files.printable import printable

FETCH = "`unic-ds teachers fetch --recipe R` on a machine with network"
HASHES = ("sha256", "content")
"""Keys of what is known of weights, in teachers.json and feature caches."""


class Place(NamedTuple):
    """Where published weights are: a hub repository (file names, preferred first) or a url."""

    repo: str
    revision: str | None
    names: tuple[str, ...]
    url: str
    cache: Path  # folder that keeps the url's file


def safe_first(name: str, default: str, default_safe: str) -> tuple[str, ...]:
    """The file names that timm and open_clip try for one name, safetensors before pickles."""
    if not name or name == default:
        return default_safe, default
    if name.endswith((".bin", ".pth")):
        return f"{name[:-4]}.safetensors", name
    return (name,)


def timm_place(row: Teacher) -> Place:
    """Where timm keeps the weights of `timm:NAME`; ValueError for a name without weights."""
    name = row.source.removeprefix("timm:")
    arch = name.split(".")[0]
    if not timm.is_model(arch):
        near = nearest(arch, timm.list_models())
        raise ValueError(f"teachers.{row.name}.source names no timm model: {arch!r}{near}")
    published = timm.list_pretrained(f"{arch}.*")
    if not published or ("." in name and name not in published):
        known = ", ".join(published) or "none"
        raise ValueError(
            f"teachers.{row.name}.source: timm has no weights {name!r}; of {arch} it has {known}"
        )
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    repo, _, revision = (cfg.hf_hub_id or "").partition("@")
    names = safe_first(cfg.hf_hub_filename or "", "pytorch_model.bin", "model.safetensors")
    url = cfg.url[0] if isinstance(cfg.url, (tuple, list)) else cfg.url or ""
    return Place(repo, revision or None, names, url, Path(torch.hub.get_dir()) / "checkpoints")


def clip_place(row: Teacher) -> Place:
    """Where open_clip keeps the weights of `open_clip:ARCH/TAG`; ValueError for unknown names."""
    import open_clip

    arch, _, tag = row.source.removeprefix("open_clip:").partition("/")
    if arch not in open_clip.list_models():
        near = nearest(arch, open_clip.list_models())
        raise ValueError(f"teachers.{row.name}.source names no open_clip model: {arch!r}{near}")
    cfg = open_clip.get_pretrained_cfg(arch, tag)
    if not cfg:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise ValueError(
            f"teachers.{row.name}.source: open_clip has no {tag!r}; of {arch} it has {known}"
        )
    repo, _, name = cfg.get("hf_hub", "").rpartition("/")
    names = safe_first(name, "open_clip_pytorch_model.bin", "open_clip_model.safetensors")
    return Place(repo, None, names, cfg.get("url", ""), Path("~/.cache/clip").expanduser())


def place(row: Teacher) -> Place:
    """Where the published weights of a timm or open_clip teacher are."""
    return timm_place(row) if row.source.startswith("timm:") else clip_place(row)


def file_path(row: Teacher) -> Path:
    """The path of a `file:PATH#arch=NAME` teacher."""
    return Path(row.source.removeprefix("file:").rpartition("#arch=")[0]).expanduser()


def locate(row: Teacher) -> Path | None:
    """The teacher's weight file on this machine, without network; None for a python teacher.

    ValueError where it is not there, saying how to get it.
    """
    kind = row.source.partition(":")[0]
    if kind == "python":
        return None
    if kind == "file":
        path = file_path(row)
        if not path.is_file():
            raise ValueError(
                f"teacher {row.name!r} has no weights at {path}; put them there or set its source"
                " (`unic-ds teachers fetch` has those of hubs)"
            )
        return path
    at = place(row)
    for name in at.names if at.repo else ():
        found = try_to_load_from_cache(at.repo, name, revision=at.revision)
        if isinstance(found, str):
            return Path(found)
    if not at.repo and (at.cache / Path(at.url).name).is_file():
        return at.cache / Path(at.url).name
    where = at.repo or at.url
    raise ValueError(
        f"teacher {row.name!r} ({row.source}): {where} is not in the cache; run {FETCH}"
    )


def fetch(row: Teacher) -> dict[str, Any]:
    """Download a teacher's weights where they are not here yet; returns `facts`.

    ValueError for weights that are not to be had, RuntimeError where the network fails.
    """
    if row.source.startswith(("timm:", "open_clip:")):
        at = place(row)
        if at.repo:
            fetch_hub(row, at)
        elif not (at.cache / Path(at.url).name).is_file():
            at.cache.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(at.url, str(at.cache / Path(at.url).name))
            except OSError as exc:
                raise RuntimeError(
                    f"teacher {row.name!r}: cannot download {at.url} ({exc})"
                ) from exc
    return facts(row)


def fetch_hub(row: Teacher, at: Place) -> None:
    """Bring the first of a place's file names that its repository has into the hub's cache."""
    try:
        for name in at.names:
            try:
                hf_hub_download(at.repo, name, revision=at.revision)
                return
            except (
                LocalEntryNotFoundError
            ) as exc:  # also an EntryNotFoundError, but the network's fault
                raise RuntimeError(
                    f"teacher {row.name!r}: the hub does not answer for {at.repo} ({exc})"
                ) from exc
            except EntryNotFoundError:
                continue
    except GatedRepoError as exc:
        raise ValueError(
            f"teacher {row.name!r}: {at.repo} wants its terms accepted on its hub page; "
            f"then `hf auth login`"
        ) from exc
    except RepositoryNotFoundError as exc:
        raise ValueError(f"teacher {row.name!r}: the hub has no repository {at.repo}") from exc
    raise ValueError(f"teacher {row.name!r}: {at.repo} holds none of {', '.join(at.names)}")


def facts(row: Teacher) -> dict[str, Any]:
    """name, source, path, bytes and hashes of the weight file (empty for a python teacher)."""
    path = locate(row)
    if path is None:
        return {"name": row.name, "source": row.source, "path": "", "bytes": 0, "sha256": ""}
    found = {"path": str(path), "bytes": path.stat().st_size}
    return {"name": row.name, "source": row.source} | found | hashes(path)


def hashes(path: Path) -> dict[str, str]:
    """Hex SHA-256 of a weight file (`sha256`) and of its tensors (`content`).

    `content` is what identifies weights: a file may be written anew, or converted. It is missing
    for files that only a model's own code reads. ValueError for what is no regular file.
    """
    try:
        stat = path.stat()
        return dict(_hashes(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns)))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror})") from None


@lru_cache(maxsize=64)
def _hashes(path: Path, _version: tuple[int, ...]) -> dict[str, str]:
    """`hashes` of a file that is the same as long as its version is."""
    with ThreadPoolExecutor(1) as beside:  # hashlib lets go of the interpreter
        whole = beside.submit(sha256, path)
        try:
            tensors = {k: v for k, v in state_of(path).items() if isinstance(v, Tensor)}
            found = {} if foreign(tensors) else {"content": tensor_files.content(tensors)}
        except ValueError:
            found = {}
        return {"sha256": whole.result()} | found


def sha256(path: Path) -> str:
    """Hex digest of a regular file, read as a stream."""
    open_regular(path).close()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def module_hashes(module: nn.Module) -> dict[str, str]:
    """`hashes` of a module's parameters and buffers, for a teacher that has no file."""
    state = module.state_dict()
    return {"sha256": digest(state), "content": tensor_files.content(state)}


def digest(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names and bytes, by which runs of older versions know a module."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(name.encode())
        total.update(tensor_files.raw_bytes(value.detach()))
    return total.hexdigest()


def known_by(hashed: Mapping[str, Any]) -> str:
    """The identity of weights: their content, or their file where no content is known."""
    return hashed.get("content") or hashed["sha256"]


def same(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """If two `hashes` are of the same weights; older versions recorded that of the file alone."""
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
    said = ((name, tensor_files.unlike_weights(value)) for name, value in state.items())
    return next((f"{printable(name)} {why}" for name, why in said if why), "")


PATCH_LIMIT = 64
FLOATING = re.compile(r"(^|[._])(weight|bias|gamma|token|embed|embedding|running_(mean|var))$")
"""Names of tensors that are floating in every model."""


def integers(state: Mapping[str, Tensor], arch: str) -> str:
    """The first tensor that is not floating where the timm model `arch` wants it so, in words.

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


def check(row: Teacher) -> None:
    """ValueError where published weights are missing, or their file holds what is no weights.

    NumPy's files, which timm or open_clip alone can read, are left to them.
    """
    path = locate(row)
    assert path is not None
    if path.suffix in (".npz", ".npy"):
        return
    arch = row.source.removeprefix("timm:") if row.source.startswith("timm:") else ""
    try:
        state = {k: v for k, v in state_of(path).items() if isinstance(v, Tensor)}
        if wrong := foreign(state) or integers(state, arch):
            raise ValueError(f"{str(path)!r} holds no weights: {wrong}")
    except ValueError as error:
        raise ValueError(f"teacher {row.name!r}: {error}") from None


def refuse_not_finite(row: Teacher, tower: nn.Module) -> None:
    """ValueError, naming the first, for weights that are not finite.

    Buffers of a python: teacher may be masks.
    """
    of_python = row.source.startswith("python:")
    values = tower.named_parameters() if of_python else tower.state_dict().items()
    for name, value in values:
        plain = not tensor_files.unlike_weights(value) and value.is_floating_point()
        if plain and not tensor_files.is_finite(value):
            raise ValueError(
                f"teacher {row.name!r}: its weights {printable(name.removeprefix('model.'))} are"
                " not finite; take another file"
            )
