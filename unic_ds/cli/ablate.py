"""`unic-ds ablate`: trains a grid of settings over several seeds, and compares the students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unic_ds.config import check, ds_config, job
from unic_ds.config.ablations import PRESETS
from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to a recipe's, which hold for all cells."""

    out: str = option("", "folder of all runs and the results [runs/ablate_GRID]")
    seeds: str = option("", "comma-separated seeds of each cell; default: the grid's, or 0,1,2")
    tasks: str = option(
        "", "tasks of `unic-ds eval`, comma-separated; default: the grid's, or knn,linear"
    )
    ds_config: str = option("ds_configs/zero2.json", "DeepSpeed configuration of all runs")
    ranks: int = option(1, "ranks of each run, on this node")
    views: int = option(
        1,
        "augmented views of each image in the feature caches that cells share; 0: no caches,"
        " teachers run in every step",
    )
    dry_run: bool = option(False, "print the cells and what would be done, and start nothing")
    yes: bool = option(False, "start even if there are more than 200 runs")
    slurm: bool = option(False, "write a script for an array of jobs, OUT/ablate.sh")
    only: int | None = option(None, "train the run of this number, from 0, and nothing else")
    collect: bool = option(False, "train nothing: evaluate the finished runs, make the table")

    def __post_init__(self) -> None:
        check(0 < self.ranks <= 1024, "--ranks", "from 1 to 1024", self.ranks)
        check(0 <= self.views <= 1000, "--views", "from 0 to 1000", self.views)
        chosen = [self.slurm, self.only is not None, self.collect, self.dry_run]
        check(sum(chosen) < 2, "--slurm, --only, --collect and --dry_run", "given alone", "several")


VERB = Verb(
    name="ablate",
    summary="train a grid of settings over several seeds, and compare the students in one table",
    options=Options,
    arguments={
        "GRID": "a .yaml file (docs/ablate.md), a preset, or axes SETTING=VALUE,VALUE (separated"
        " by ; if values have commas): each combination of values is a cell",
        "[GRID...]": "further axes",
    },
    lists={"presets": {name: preset.summary for name, preset in PRESETS.items()}},
    takes="recipe",
    exit_codes={1: "a run or an evaluation failed; the same command tries it again"},
    usage="unic-ds ablate GRID [--seeds 0,1,2] [--option value ...]\n"
    "       unic-ds ablate drop.rate=0,0.25,0.5 'ladder.rungs=last;5,11' ...",
)


def run(argv: Sequence[str]) -> int:
    """Train and compare the cells of a grid; return the exit code."""
    call = VERB.read(argv)
    given = call.options
    from unic_ds.ablation import ablate, cells, checks, grid, job_array

    found = grid.read(call.arguments, call.overrides, seeds=given.seeds, tasks=given.tasks)
    grid.check_count(found, yes=given.yes)
    ds_config.read(given.ds_config)
    out = folder_of(given.out) if given.out else ablate.default_folder(found.name)
    study = cells.Study(
        grid=found, out=out, ds_config=given.ds_config, ranks=given.ranks, views=given.views
    )
    checks.check_cells(study)
    if given.dry_run:
        ablate.show_cells(study)
        return 0
    job.check_room(out)
    if given.slurm:
        job_array.write(study)
        return 0
    if given.only is not None:
        return ablate.train_only(study, given.only)
    return ablate.collect(study) if given.collect else ablate.train_and_evaluate(study)


def folder_of(text: str) -> Path:
    """The path of --out, in which ~ is a home; ValueError for one of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"--out {text!r} is in the home of no user; give another path") from None
