"""`unic-ds teachers check`: runs real images through each teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unic_ds.cli import tables
from unic_ds.config import job
from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to a recipe's."""

    precision: Literal["int8", "fp8", "int8_dynamic", "fp8_dynamic"] | None = option(
        None, "measure the cosine between each teacher's tokens in this precision and in bf16"
    )
    json: bool = option(False, "print one JSON object")


VERB = Verb(
    name="teachers check",
    summary="run an image through each teacher: tokens, widths, grid, preprocessing, licence,"
    " SHA-256",
    options=Options,
    takes="recipe",
    exit_codes={1: "tokens are not finite; with --precision, a mean cosine is below .998"},
)


def run(argv: Sequence[str]) -> int:
    """Describe the teachers of a recipe, or measure them in eight bits; return the exit code."""
    call = VERB.read(argv)
    cfg = call.config()
    job.prepare_demonstration(cfg)
    from unic_ds.training import teacher_check

    precision = call.options.precision
    rows = teacher_check.agreement(cfg, precision) if precision else teacher_check.describe(cfg)
    tables.show(rows, as_json=call.options.json)
    teacher_check.refuse(rows)
    return 0
