"""`unic-ds teachers fetch`: downloads the teachers' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unic_ds.cli import tables
from unic_ds.config import job
from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to a recipe's."""

    json: bool = option(False, "print one JSON object")


VERB = Verb(
    name="teachers fetch",
    summary="download the teachers' weights, on a machine that reaches the hub",
    options=Options,
    takes="recipe",
    needs_hub=True,
)


def run(argv: Sequence[str]) -> int:
    """Download the weights of a recipe's teachers, with sizes and hashes; return the exit code."""
    call = VERB.read(argv)
    cfg = call.config()
    job.prepare_demonstration(cfg)
    from unic_ds.teachers import sources

    rows = [{"name": row.name, "source": row.source, **sources.fetch(row)} for row in cfg.teachers]
    tables.show(rows, as_json=call.options.json)
    return 0
