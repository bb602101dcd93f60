"""`unic-ds plan`: predicts memory, traffic and time of a run, and searches for fast settings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path

from unic_ds.cli import plan_tables
from unic_ds.config import Config, auto_teachers, check, ds_config, job
from unic_ds.config.data import IMAGENET
from unic_ds.config.option import option
from unic_ds.config.verb import Call, Verb
from unic_ds.planning import gpus
from unic_ds.planning.gpus import GPUS, Efficiency


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to a recipe's."""

    gpus: int | None = option(None, "number of GPUs; default: those of a node")
    gpu: str = option("h100-80", f"{', '.join(GPUS)}, or a .yaml file that describes one")
    ds_config: str = option("ds_configs/zero2.json", "DeepSpeed configuration")
    images: int = option(IMAGENET, "training images, for the length of an epoch")
    efficiency: str = option(
        "",
        "measured fractions of the GPU's peaks, which replace the assumed ones, as in"
        " student=0.4,links=0.7:"
        f" {', '.join(f.name for f in fields(Efficiency))}",
    )
    search: bool = option(False, "list settings that fit, the fastest first")
    json: bool = option(False, "print one JSON list")
    out: str = option("", "run folder, which keeps the choice of --teachers auto; else ignored")
    resume: str = option("", "ignored, so that the options of a training command are accepted")
    among: str = option("", job.JOB_OPTIONS["among"])
    budget: str = option("", job.JOB_OPTIONS["budget"])

    def __post_init__(self) -> None:
        check(self.gpus is None or self.gpus > 0, "--gpus", "positive", self.gpus)
        check(self.images > 0, "--images", "positive", self.images)


VERB = Verb(
    name="plan",
    summary="predict memory, traffic and time of a run before it is queued",
    options=Options,
    takes="recipe",
    exit_codes={1: "the run does not fit"},
)


def run(argv: Sequence[str]) -> int:
    """Print a plan for each stage of a run, or the results of a search; return the exit code."""
    call = VERB.read(argv)
    options = call.options
    gpu, rates = gpus.get(options.gpu), Efficiency.parse(options.efficiency)
    count = gpu.per_node if options.gpus is None else options.gpus
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        cfg = config_of(call)
    if not cfg.teachers:
        raise ValueError("plan needs teachers; a --recipe has some")
    file = ds_config.read(options.ds_config)
    accept(cfg)
    from unic_ds.planning import search

    if options.search:
        found = search.search(cfg, file, gpu, count, images=options.images, efficiency=rates)
        if not found:
            raise RuntimeError(f"nothing fits {count} x {gpu.name}; take more or larger GPUs")
        plan_tables.show_search(found, as_json=options.json)
        return 0
    plans = search.plan_stages(cfg, file, gpu, count, images=options.images, efficiency=rates)
    plan_tables.show_stages(plans, as_json=options.json)
    return 0 if all(plan.fits for plan in plans) else 1


def config_of(call: Call[Options]) -> Config:
    """The Config of the call, with the teachers that `auto` chooses."""
    names = [name for name in ("out", "among", "budget") if name in call.given]
    given = call.overrides | {name: getattr(call.options, name) for name in ["ds_config", *names]}
    given = auto_teachers.resolve(given, ranks=1)  # a batch that does not fit is the plan's to say
    return job.configure(given.get("recipe", "quickstart"), job.run_options(given))


def accept(cfg: Config) -> None:
    """Raise ValueError if a model of any stage cannot be built."""
    from unic_ds.training import acceptance

    acceptance.accept_models([stage for stage, _ in job.staged(cfg, Path())])
