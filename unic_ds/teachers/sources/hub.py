"""Published weights: fetched on a login node, found offline on the rest.

Hub files are read and written through huggingface_hub's own cache, url files through that of timm
or open_clip, so that files of other programs are found too. Set HF_HUB_OFFLINE before importing
this, not after.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from unic_ds import config

FETCH = "`unic-ds teachers fetch --recipe R` on a machine with network"


class Published(NamedTuple):
    """A published weight file: a hub repository (file names, preferred first) or a url."""

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


def locate(row: config.Teacher, at: Published) -> Path:
    """A published weight file in the caches of this machine; ValueError, with the remedy, if none.

    The network is not used.
    """
    for name in at.names if at.repo else ():
        found = try_to_load_from_cache(at.repo, name, revision=at.revision)
        if isinstance(found, str):
            return Path(found)
    if not at.repo and (at.cache / Path(at.url).name).is_file():
        return at.cache / Path(at.url).name
    raise ValueError(
        f"teacher {row.name!r} ({row.source}): {at.repo or at.url} is not in the cache; run {FETCH}"
    )


def fetch(row: config.Teacher, at: Published) -> None:
    """Download a published weight file unless it is in the cache.

    ValueError for weights that do not exist or are gated, RuntimeError if the network fails.
    """
    if at.repo:
        fetch_from_hub(row, at)
    elif not (at.cache / Path(at.url).name).is_file():
        at.cache.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(at.url, str(at.cache / Path(at.url).name))
        except OSError as exc:
            raise RuntimeError(f"teacher {row.name!r}: cannot download {at.url} ({exc})") from exc


def fetch_from_hub(row: config.Teacher, at: Published) -> None:
    """Download the first of the file names that the repository has into the hub's cache."""
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
