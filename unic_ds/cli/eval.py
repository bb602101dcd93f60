"""`unic-ds eval`: compares students, teachers and published models on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unic_ds.config import Config, eval_spec, job
from unic_ds.config.evaluation import TASKS
from unic_ds.config.option import option
from unic_ds.config.verb import Call, Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to a recipe's."""

    models: str = option(
        "",
        "comma-separated models (needed): a run folder, a student/ or imported folder, a teacher's"
        " name or source (timm:NAME, open_clip:ARCH/TAG, ...), pixels; COLUMN=MODEL names a column",
    )
    protocol: Literal["", "quick", "unic", "dinov2", "radio", "eupe"] = option(
        "", "short for --eval.protocol"
    )
    out: str = option("", "folder to write evaluation.json, results.json and results.png to")
    json: bool = option(False, "print one JSON object, with the protocol of each value")


VERB = Verb(
    name="eval",
    summary="compare models on tasks: a table of students, teachers and published models",
    options=Options,
    arguments={"TASK[,TASK]": "comma-separated tasks"},
    lists={"tasks": TASKS},
    takes="recipe",
    usage="unic-ds eval TASK[,TASK] --models MODEL[,MODEL] --eval.data DIR [--option value ...]\n"
    "       torchrun --nproc_per_node N -m unic_ds.cli eval ...    (N GPUs)",
)


def run(argv: Sequence[str]) -> int:
    """Evaluate, print the table or JSON; return the exit code."""
    call = VERB.read(argv)
    specs = [part for part in map(str.strip, call.options.models.split(",")) if part]
    if not specs:
        raise ValueError("--models is needed, for example --models runs/quickstart,pixels")
    cfg = settings(call, specs)
    if not cfg.plugins:  # which may add tasks
        eval_spec.tasks(call.arguments[0])
    eval_spec.folders(cfg.eval.data, plugins=bool(cfg.plugins))
    job.prepare_demonstration(cfg)
    out = Path(call.options.out) if call.options.out else None
    if out:
        job.check_room(out)
    from unic_ds.training import model_comparison

    model_comparison.compare(call.arguments[0], specs, cfg, out=out, as_json=call.options.json)
    return 0


def settings(call: Call[Options], specs: Sequence[str]) -> Config:
    """The Config of the recipe, which is that of the first run among the models if none is given.

    All images are used unless --eval.max_train or --eval.max_val say otherwise.
    """
    given = dict(call.overrides)
    recipe = given.pop("recipe", "") or recipe_of(specs)
    options = {"eval.max_train": "0", "eval.max_val": "0"} | given
    if call.options.protocol:
        options["eval.protocol"] = call.options.protocol
    return job.configure(recipe, options)


def recipe_of(specs: Sequence[str]) -> str:
    """The config.yaml of the first run folder, or run's student/, among the models."""
    for spec in specs:
        for text in (spec, spec.partition("=")[2]):
            for folder in (Path(text), Path(text).parent):
                if text and job.kind_of(str(folder / "config.yaml")) == "file":
                    return str(folder / "config.yaml")
    return "quickstart"
