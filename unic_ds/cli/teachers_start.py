"""`unic-ds teachers start`: writes a student's initial weights from a teacher."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unic_ds.config import Config, Teacher, check, data_spec, job
from unic_ds.config.evaluation import FEWEST_COMPARED
from unic_ds.config.option import nearest, option
from unic_ds.config.verb import Verb
from unic_ds.files.printable import printable
from unic_ds.process import console

MOST = 100_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to a recipe's."""

    out: str = option("start.safetensors", "new file, for --student.init")
    images: int = option(1500, "most images over which the CLS token is standardised")

    def __post_init__(self) -> None:
        fits = FEWEST_COMPARED <= self.images <= MOST
        check(fits, "--images", f"from {FEWEST_COMPARED} to {MOST:,}", self.images)


VERB = Verb(
    name="teachers start",
    summary="write a student's initial weights: a teacher of its architecture, standardised",
    arguments={"NAME": "a teacher of the recipe: a ViT of timm with a CLS token"},
    options=Options,
    takes="recipe",
)


def run(argv: Sequence[str]) -> int:
    """Write the weights, and print the options that train from them; return the exit code."""
    call = VERB.read(argv)
    (name,), out = call.arguments, Path(call.options.out)
    cfg = call.config()
    row = row_named(name, cfg)
    arch = row.parsed_source.arch  # empty for run: and python:
    if arch and "student.model" not in call.overrides:
        cfg = replace(cfg, student=replace(cfg.student, model=arch))
    check_inputs(cfg, row, out)
    from unic_ds.training import teacher_start

    teacher_start.write(cfg, row, images=call.options.images, out=out)
    if console.first_rank():
        student = cfg.student
        print(
            f"wrote {printable(str(out))!r}; train with --student.model {student.model}"
            f" --student.size {student.size} --student.init {printable(shlex.quote(str(out)))}"
            " --optim.layer_decay 0.6 --ladder.projector linear"
        )
    return 0


def row_named(name: str, cfg: Config) -> Teacher:
    """The teacher of a name; ValueError for another."""
    rows = {row.name: row for row in cfg.teachers}
    if name not in rows:
        raise ValueError(
            f"no teacher is named {name!r}{nearest(name, list(rows))}; there are {', '.join(rows)}"
        )
    return rows[name]


def check_inputs(cfg: Config, row: Teacher, out: Path) -> None:
    """Raise ValueError unless there are images and weights, and room for a new file."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must be a new .safetensors file, got {printable(str(out))!r}")
    if out.exists():
        raise ValueError(f"--out {printable(str(out))!r} exists; choose another name, or delete it")
    if not cfg.data.train:
        raise ValueError("the CLS token is standardised over images; give --data.train DIR")
    job.check_room(out)
    job.prepare_demonstration(cfg)
    data_spec.check(cfg.data.train, "--data.train")
    if row.parsed_source.kind == "file":
        job.weight_file(row)
