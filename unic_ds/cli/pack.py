"""`unic-ds pack`: writes images as tar shards with an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unic_ds.config import check
from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb."""

    shard_mb: float = option(512.0, "size of a shard in MB")
    max_side: int = option(0, "longest side of a stored image in pixels; 0: as it is")
    workers: int = option(0, "processes that read images; 0: as many as cores")
    seed: int = option(0, "of the order in which images are stored")

    def __post_init__(self) -> None:
        check(self.shard_mb > 0, "--shard_mb", "positive", self.shard_mb)
        for name in ("max_side", "workers", "seed"):
            check(getattr(self, name) >= 0, f"--{name}", ">= 0", getattr(self, name))


VERB = Verb(
    name="pack",
    summary="write images as tar shards with an index; the same command resumes",
    options=Options,
    arguments={"SRC": "images: anything that --data.train takes", "OUT": "new folder"},
)


def run(argv: Sequence[str]) -> int:
    """Write a source as tar shards; return the exit code."""
    call = VERB.read(argv)
    (src, out), options = call.arguments, call.options
    from unic_ds.data import pack, scan

    settings = pack.Settings(
        shard_mb=options.shard_mb, max_side=options.max_side, seed=options.seed
    )
    print(pack.pack(scan(src), Path(out), settings, workers=options.workers))
    return 0
