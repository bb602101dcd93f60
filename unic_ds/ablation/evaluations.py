"""Evaluations of a grid: one a seed, of all its students and the teachers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from unic_ds import files
from unic_ds.ablation import child
from unic_ds.ablation.cells import Run, Study
from unic_ds.ablation.run_cells import SETTINGS, write_settings
from unic_ds.config import Config, overrides
from unic_ds.evaluate import comparison
from unic_ds.process import console

ASKED = "asked.json"
"""Students, tasks and settings of a complete evaluation."""

LIMITS = ("eval.max_train", "eval.max_val")
"""Settings that `unic-ds eval` takes from its command line alone: all images without."""


def folder_of(study: Study, seed: int) -> Path:
    """The folder of the evaluation of a seed's students."""
    return study.out / "eval" / f"seed{seed}"


def students(study: Study, seed: int) -> list[Run]:
    """The finished runs of a seed."""
    return [run for run in study.runs_of(seed) if run.finished]


def up_to_date(study: Study, seed: int) -> bool:
    """True if the evaluation that is there is that of the present students, tasks and settings."""
    folder = folder_of(study, seed)
    if not all((folder / name).is_file() for name in (ASKED, comparison.FILE)):
        return False
    return files.read_text(folder / ASKED) == request(study, seed, students(study, seed))


def request(study: Study, seed: int, runs: list[Run]) -> str:
    """All that an evaluation depends on, as text; folders may be moved."""
    facts = {
        "tasks": study.grid.tasks,
        "limits": limits(study),
        "settings": overrides.to_dict(config_of(study, seed)),
        "students": [stamp(run) for run in runs],
    }
    return json.dumps(facts)


def config_of(study: Study, seed: int) -> Config:
    """The settings of a seed's evaluation: those of all cells."""
    return replace(study.base, seed=seed)


def limits(study: Study) -> dict[str, str]:
    """The options of `LIMITS`."""
    return {name: study.settings.get(name, "0") for name in LIMITS}


def stamp(run: Run) -> list[object]:
    """Time and size of a student's weights, which change if it is trained again."""
    status = (run.folder / "student" / "model.safetensors").stat()
    return [run.cell, status.st_mtime_ns, status.st_size]


def evaluate(study: Study, seed: int, start: child.Start = child.start) -> bool:
    """Evaluate the finished students of a seed and the teachers; False if it failed.

    Nothing is done if there are none, or the same evaluation is there.
    """
    runs = students(study, seed)
    if not runs or up_to_date(study, seed):
        return True
    folder, asked = folder_of(study, seed), request(study, seed, runs)
    (folder / ASKED).unlink(missing_ok=True)  # the files of an evaluation are written one by one
    console.say(f"evaluation of {len(runs)} students and the teachers, seed {seed}")
    settings = write_settings(folder / SETTINGS, config_of(study, seed))
    words = [*words_of(study, seed, runs), "--recipe", str(settings)]
    code = start(words, study.ranks, folder / "eval.log")
    if code or not (folder / comparison.FILE).is_file():
        console.say(f"the evaluation failed: {child.last_error(folder / 'eval.log')}")
        console.say(f"its output is in {folder / 'eval.log'}; the same command tries it again")
        return False
    files.write_atomic(folder / ASKED, asked)
    return True


def words_of(study: Study, seed: int, runs: list[Run]) -> list[str]:
    """The command line of an evaluation without its recipe."""
    models = [f"{run.cell}={run.folder}" for run in runs]
    models += [row.name for row in study.base.teachers]
    words = ["eval", study.grid.tasks, "--models", ",".join(models)]
    words += ["--out", str(folder_of(study, seed))]
    return words + [word for name, text in limits(study).items() for word in (f"--{name}", text)]
