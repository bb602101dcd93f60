"""Where a teacher's weights lie: fetched on a login node, found offline on the rest.

Hub files are read and written through huggingface_hub's own cache, url files through that of timm
or open_clip, so that what other programs downloaded is found too. Set HF_HUB_OFFLINE before
importing this, not after.
"""

from __future__ import annotations

import hashlib
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
from torch import nn

from unic_ds.config import Teacher
from unic_ds.override import nearest

FETCH = "`unic-ds teachers fetch --recipe R` on a machine with network"


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
    """name, source, path, bytes and sha256 of the weight file (empty for a python teacher)."""
    path = locate(row)
    if path is None:
        return {"name": row.name, "source": row.source, "path": "", "bytes": 0, "sha256": ""}
    found = {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}
    return {"name": row.name, "source": row.source} | found


def sha256(path: Path) -> str:
    """Hex digest of a file, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(module: nn.Module) -> str:
    """Hex sha256 over a module's parameters and buffers, for a teacher that has no file."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
