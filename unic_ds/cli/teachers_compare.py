"""`unic-ds teachers compare`: tells which teachers are alike, what each costs, which to take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unic_ds.cli import comparison_tables, trained_check
from unic_ds.cli.eval import recipe_of
from unic_ds.config import Config, check, data_spec, job
from unic_ds.config.evaluation import FEWEST_COMPARED
from unic_ds.config.option import option
from unic_ds.config.verb import Verb
from unic_ds.files import run_files
from unic_ds.files.printable import printable
from unic_ds.process import console

MOST = 20_000
CHECK = (
    "\nNo student was trained for this. Small students with and without each of the teachers (a"
    " minute or two each on one core, once the teachers' features are stored):"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to a recipe's."""

    images: int = option(2000, "most images, drawn by the seed and spread over the classes")
    budget: float | None = option(
        None, "GFLOPs of an image that the chosen teachers may cost together; default: no limit"
    )
    student: str = option(
        "",
        "finished run, or its student/: measure the conflict of its teachers' gradients; its recipe"
        " is the default",
    )
    out: str = option(
        "", "folder to write teacher_comparison.json and .png to; a run's report then shows them"
    )
    json: bool = option(False, "print one JSON object")

    def __post_init__(self) -> None:
        fits = FEWEST_COMPARED <= self.images <= MOST
        check(fits, "--images", f"from {FEWEST_COMPARED} to {MOST:,}", self.images)
        budget = self.budget
        check(budget is None or 0 < budget < float("inf"), "--budget", "positive", budget)


VERB = Verb(
    name="teachers compare",
    summary="compare teachers before training: cost, spectrum, likeness, strengths, best subset",
    options=Options,
    takes="recipe",
    usage="unic-ds teachers compare --teachers A=SOURCE,B=SOURCE --data.train DIR [--option value"
    " ...]\n       torchrun --nproc_per_node N -m unic_ds.cli teachers compare ...    (N GPUs)",
)


def run(argv: Sequence[str]) -> int:
    """Compare the teachers of a recipe, print tables or JSON; return the exit code."""
    call = VERB.read(argv)
    options = call.options
    if options.student:
        call.overrides.setdefault("recipe", recipe_of([options.student]))
    cfg = call.config()
    check_inputs(cfg)
    student = Path(options.student).expanduser() if options.student else None
    if student and not job.kind_of(str(student)):
        raise ValueError(
            f"--student {printable(options.student)!r} does not exist; give a finished run's folder"
        )
    out = Path(options.out) if options.out else None
    if out:
        job.check_room(out)
    from unic_ds.training import teacher_comparison

    found = teacher_comparison.compare(
        cfg,
        images=options.images,
        budget=options.budget,
        student=student,
        out=out,
        as_json=options.json,
    )
    if console.first_rank():
        print(json.dumps(found)) if options.json else comparison_tables.show(found)
        if found["labelled"] and not options.json:
            chosen = [step["teacher"] for step in found["selection"]["steps"]]
            print(f"{CHECK}\n  {trained_check.command(call.overrides, cfg, chosen)}")
        if out and not options.json:
            print(f"\nwrote {run_files.COMPARISON} and its picture to {str(out)!r}")
    return 0


def check_inputs(cfg: Config) -> None:
    """Raise ValueError unless there are two teachers or more, and images."""
    if len(cfg.teachers) < 2:
        raise ValueError(
            f"a comparison needs two teachers or more, got {len(cfg.teachers)}; give --teachers"
            " A=SOURCE,B=SOURCE"
        )
    if not cfg.data.train:
        raise ValueError("a comparison needs images; give --data.train DIR")
    job.prepare_demonstration(cfg)
    data_spec.check(cfg.data.train, "--data.train")
    for row in cfg.teachers:
        if row.parsed_source.kind == "file":
            job.weight_file(row)
        elif row.parsed_source.kind == "run":
            job.student_folder(row)
