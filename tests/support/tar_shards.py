"""Tar shards for tests, member by member."""

from __future__ import annotations

import io
import tarfile


def shard(path, members):
    """A tar of {name: content}."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
