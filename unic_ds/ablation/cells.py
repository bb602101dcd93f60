"""Cells of a grid as Configs: each is checked before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from unic_ds.ablation.grid import Grid, Options
from unic_ds.config import Config, Teacher, data_spec, eval_spec, extension, job, overrides
from unic_ds.config.option import SHOWN, check
from unic_ds.files.printable import printable

DEFAULTS = {"probe.pictures": "0"}
"""Settings of all cells unless the grid has others."""

LIVE = "none"
"""Value of teachers.cache for a cell whose teachers run in every step."""

PLACES = ("{out}", "{seed}")
"""Parts of a value that are replaced: by the folder of the grid, and the seed of a run."""


@dataclass(frozen=True)
class Run:
    """One training: a cell with a seed."""

    number: int
    """From 0, all cells of the first seed before those of the second."""
    cell: str
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        """True if the student is exported."""
        return job.ended(self.folder)

    @property
    def log(self) -> Path:
        """File with the output of the training."""
        return self.folder / "train.log"

    def describe(self) -> str:
        """Cell and seed in words."""
        return f"{self.cell}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid in a folder, and how its runs are started."""

    grid: Grid
    out: Path
    ds_config: str = "ds_configs/zero2.json"
    ranks: int = 1
    views: int = 1
    """Augmented views in the feature caches; 0: no caches."""

    @cached_property
    def cells(self) -> dict[str, Options]:
        """The settings of each cell."""
        return self.grid.all_cells()

    @cached_property
    def settings(self) -> Options:
        """The settings of all cells."""
        return DEFAULTS | self.grid.settings

    @cached_property
    def base(self) -> Config:
        """The Config of the settings of all cells; ValueError as `job.configure`."""
        return job.configure(self.grid.recipe, self.settings)

    @cached_property
    def baseline(self) -> str:
        """The cell that the others are compared with."""
        return self.grid.baseline or next(iter(self.cells))

    def runs(self) -> Iterator[Run]:
        """All runs in their order."""
        for i, seed in enumerate(self.grid.seeds):
            for j, cell in enumerate(self.cells):
                number = i * len(self.cells) + j
                yield Run(number, cell, seed, self.folder(cell, seed))

    def folder(self, cell: str, seed: int) -> Path:
        """The folder of a run."""
        return self.out / cell / f"seed{seed}"

    def config(self, cell: str, seed: int) -> Config:
        """The Config of a run; ValueError, which names the cell, for what is illegal."""
        try:
            return self.configure(self.cells[cell], seed)
        except ValueError as error:
            raise ValueError(f"cell {cell}: {error}") from None

    def configure(self, options: Mapping[str, str], seed: int) -> Config:
        """The Config of all cells' settings with some options changed."""
        places = dict(zip(PLACES, (str(self.out.absolute()), str(seed)), strict=True))
        filled = {name: with_places(text, places) for name, text in options.items()}
        recipe, teachers = filled.pop("recipe", ""), filled.pop("teachers", None)
        base = job.configure(recipe, self.settings) if recipe else self.base
        rows = base.teachers if teachers is None else teachers_of(teachers, base.teachers)
        for name in filled:
            evaluates = name.startswith("eval.")
            check(not evaluates, printable(name, SHOWN), "the same in all cells", filled[name])
        cfg = overrides.build(base, overrides.by_field(filled), rows, ("recipe",))
        return replace(cfg, seed=seed, eval=replace(cfg.eval, on=False))

    def compared_with(self, cell: str) -> str:
        """The cell that a cell is compared with; empty for the baseline."""
        other = self.grid.against.get(cell, self.baseline)
        return "" if other == cell else other

    def teaches_itself(self) -> list[str]:
        """The cells that have a run of this grid as their teacher."""
        return [name for name, row in self.cells.items() if PLACES[0] in row.get("teachers", "")]


def with_places(text: str, places: Mapping[str, str]) -> str:
    """Text with the places of `PLACES` filled."""
    for place, value in places.items():
        text = text.replace(place, value)
    return text


def teachers_of(text: str, rows: Sequence[Teacher]) -> tuple[Teacher, ...]:
    """Teachers by comma-separated names of `rows`, which keep their settings, or sources."""
    known = {row.name: row for row in rows}
    parts = filter(None, map(str.strip, text.split(",")))
    return tuple(
        row
        for part in parts
        for row in ([known[part]] if part in known else overrides.parse_teachers(part))
    )


def check_cells(study: Study) -> None:
    """Raise ValueError, one sentence, for a cell that is illegal or equal to another.

    Missing images and weights are errors, too; the demonstration is prepared if it is used.
    """
    check_names(study)
    known: dict[str, str] = {}
    late = study.teaches_itself()
    for cell in study.cells:
        cfg = study.config(cell, study.grid.seeds[0])
        key = json.dumps(overrides.to_dict(replace(cfg, recipe="")), sort_keys=True)
        if key in known:
            raise ValueError(
                f"the cells {known[key]} and {cell} have equal settings; leave one of them out"
            )
        known[key] = cell
        try:
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


def check_folders(study: Study, cell: str) -> None:
    """Raise ValueError if a folder of the cell holds a run with other settings."""
    for seed in study.grid.seeds:
        folder = study.folder(cell, seed)
        if (folder / "config.yaml").is_file():
            extension.check(study.config(cell, seed), folder, resume="auto", last=True)


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


def shared_images(cfg: Config) -> list[str]:
    """Folders of evaluation images that are training images, or lie inside of these."""
    train = [Path(path).resolve() for path, _ in data_spec.parts(cfg.data.train)]
    given = eval_spec.folders(cfg.eval.data, plugins=bool(cfg.plugins)).values()
    val = [Path(path) for path, _ in data_spec.parts(cfg.data.val)] if cfg.data.val else []
    found = [path for path in (*val, *given) if inside_one(path.resolve(), train)]
    return [printable(path) for path in dict.fromkeys(found)]


def inside_one(path: Path, folders: Sequence[Path]) -> bool:
    """True if a path is one of the folders or inside of one."""
    return any(path.is_relative_to(folder) for folder in folders)
