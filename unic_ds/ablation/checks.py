"""Checks of a grid before anything starts: its cells, their folders, the images of its tasks."""

from __future__ import annotations

import json
from dataclasses import replace

from unic_ds.ablation import reuse
from unic_ds.ablation.cells import Study
from unic_ds.config import Config, eval_spec, job, overrides
from unic_ds.config.option import check


def check_cells(study: Study) -> None:
    """Raise ValueError, one sentence, for a cell that is illegal or equal to another.

    Missing images and weights are errors, too; the demonstration is prepared if it is used.
    """
    check_names(study)
    known: dict[str, str] = {}
    late = set(study.teaches_itself)
    for cell in study.cells:
        cfg = study.config(cell, study.grid.seeds[0])
        plain = overrides.to_dict(replace(cfg, recipe=""))
        key = json.dumps([plain, study.live(cell)], sort_keys=True)
        if key in known:
            raise ValueError(
                f"the cells {known[key]} and {cell} have equal settings; leave one of them out"
            )
        known[key] = cell
        try:
            refuse_extension(cfg)
            if cell not in late:  # its teachers are trained first
                job.check_inputs(cfg, study.out / cell)
            check_folders(study, cell)
        except ValueError as error:
            raise ValueError(f"cell {cell}: {error}") from None
    check_evaluation(study)


def check_names(study: Study) -> None:
    """Raise ValueError for cells that are compared with none, or named like a teacher."""
    names = list(study.cells)
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    for cell in (study.baseline, *study.grid.against, *study.grid.against.values()):
        check(cell in study.cells, "a cell of baseline or against", f"one of {known}", cell)
    clash = study.cells.keys() & {row.name for row in study.base.teachers}
    check(not clash, "a cell's name", "another than a teacher's", ", ".join(sorted(clash)))
    check("," not in str(study.out), "--out", "a path without commas", str(study.out))


def refuse_extension(cfg: Config) -> None:
    """Raise ValueError for run.extend: all students of a grid have the length of its settings."""
    want = "false in a grid; give the new length and another --out"
    check(not cfg.run.extend, "run.extend", want, True)


def check_folders(study: Study, cell: str) -> None:
    """Raise ValueError if a folder of the cell holds a run that was started in another way."""
    for seed in study.grid.seeds:
        if (study.folder(cell, seed) / "config.yaml").is_file():
            reuse.check(study, study.run(cell, seed))


def check_evaluation(study: Study) -> None:
    """Raise ValueError for a task that would have no images after all the trainings."""
    cfg = study.base
    given = eval_spec.folders(cfg.eval.data, plugins=bool(cfg.plugins))
    for task in study.grid.tasks.split(","):
        known = "" in given or task.strip() in given or cfg.data.val or cfg.data.val_share
        if not known:
            raise ValueError(
                f"the task {task.strip()} needs validation images; give --eval.data DIR,"
                " --data.val DIR or --data.val_share"
            )
