"""`unic-ds cache`: stores the teachers' features of augmented views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unic_ds.config import check, job
from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to a recipe's."""

    views: int = option(1, "augmented views of each image")
    dtype: Literal["bf16", "int8"] = option("bf16", "type of the stored features")
    batch: int = option(32, "images per forward")
    yes: bool = option(False, "write even if it is more than 100 GB")

    def __post_init__(self) -> None:
        for name in ("views", "batch"):
            check(getattr(self, name) > 0, f"--{name}", "positive", getattr(self, name))


VERB = Verb(
    name="cache",
    summary="store the teachers' features of augmented views, to train with --teachers.cache OUT",
    options=Options,
    arguments={"OUT": "folder for the features"},
    takes="recipe",
)


def run(argv: Sequence[str]) -> int:
    """Store the features of a recipe's teachers; return the exit code."""
    call = VERB.read(argv)
    cfg, options = call.config(), call.options
    job.prepare_demonstration(cfg)
    if not cfg.teachers or not cfg.data.train:
        raise ValueError("cache needs teachers and --data.train; a --recipe may have both")
    from unic_ds.training import build_cache

    out = Path(call.arguments[0])
    build_cache.store(
        cfg, out, views=options.views, dtype=options.dtype, yes=options.yes, batch=options.batch
    )
    return 0
