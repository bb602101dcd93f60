"""A Slurm script whose task I trains run I of a grid."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path

import yaml

from unic_ds.ablation.cells import Study
from unic_ds.ablation.grid import ASK_OVER, Grid
from unic_ds.files import write_atomic
from unic_ds.process import console

FILE = "ablate.sh"

SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name={name} --output=slurm/%x-%A_%a.log --open-mode=append
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --array=0-{last}
#SBATCH --time=24:00:00 --signal=B:USR1@300
# The runs of a grid, one a task. From the repository's root:
#   sbatch --gpus-per-node={ranks} {file}
# The grid is the copy that the command names: another grid gives another script and copy.
# A task that is out of time saves before; the same sbatch command resumes it, and leaves out what
# is finished. The table of the runs that are finished:
#   {collect}

if [ ! -f slurm/env.sh ]; then
  echo "unic_ds: error: no slurm/env.sh in $PWD; submit there, or with --chdir=REPOSITORY" >&2
  exit 2
fi
source slurm/env.sh || exit
exec "${{CONTAINER[@]}}" {command} --ranks "$NPROC" --only "$SLURM_ARRAY_TASK_ID"
"""


def write(study: Study) -> None:
    """Write the script and a copy of the grid, and print how it is submitted.

    ValueError if a cell's teacher is a run of the same grid, which has to be trained before.
    """
    if late := study.teaches_itself:
        raise ValueError(
            f"the teacher of {', '.join(late)} is a run of this grid, and tasks of an array have no"
            " order; leave these cells out, or start the grid without --slurm"
        )
    file = study.out / FILE
    study.out.mkdir(parents=True, exist_ok=True)
    base = shlex.join(["unic-ds", "ablate", *words_of(study, write_copy(study))])
    collect = f"{base} --ranks {study.ranks} --collect true"
    text = SCRIPT.format(
        name=f"ablate-{short_name(study.grid)}",
        last=study.grid.runs - 1,
        ranks=study.ranks,
        file=one_line(shlex.quote(str(file))),
        collect=one_line(collect),
        command=base,
    )
    write_atomic(file, text)
    console.say(f"{file}: {study.grid.runs} runs; submit them by")
    console.say(f"  sbatch --gpus-per-node={study.ranks} {shlex.quote(str(file))}")
    console.say(f"and make the table afterwards by\n  {collect}")


def words_of(study: Study, copy: Path) -> list[str]:
    """Words of the command line for the copy of a grid, without --ranks and what is to be done."""
    words = [str(copy), "--out", str(study.out), "--ds_config", study.ds_config]
    words += ["--views", str(study.views)]
    return words + (["--yes", "true"] if study.grid.runs > ASK_OVER else [])


def write_copy(study: Study) -> Path:
    """Write the grid with its settings under a name by its content; returns the path.

    Tasks that wait keep their numbers if the file of the grid is edited, or this is called again.
    """
    grid = study.grid
    plain = {
        "recipe": grid.recipe,
        "settings": dict(grid.settings),
        "cells": {name: dict(options) for name, options in grid.cells.items()},
        "axes": {name: list(values) for name, values in grid.axes.items()},
        "seeds": list(grid.seeds),
        "tasks": grid.tasks,
        "baseline": grid.baseline,
        "against": dict(grid.against),
    }
    text = yaml.safe_dump(plain, sort_keys=False)
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    file = study.out / f"{short_name(grid)}-{digest}.yaml"
    write_atomic(file, text)
    return file


def short_name(grid: Grid) -> str:
    """The grid's name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", grid.name)[:40]


def one_line(text: str) -> str:
    """Text for a comment of a script, which ends with its line."""
    return text.replace("\n", " ").replace("\r", " ")
