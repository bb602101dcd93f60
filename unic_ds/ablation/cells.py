"""Cells of a grid as Configs, and its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from unic_ds.ablation.grid import Grid, Options, is_live, without_live
from unic_ds.config import Config, data_spec, eval_spec, job, overrides
from unic_ds.config.option import SHOWN, check
from unic_ds.files.printable import printable

DEFAULTS = {"probe.pictures": "0"}
"""Settings of all cells unless the grid has others."""

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
        return job.configure(self.grid.recipe, without_live(self.settings))

    @cached_property
    def places(self) -> dict[str, int]:
        """Cell -> its place among the cells."""
        return {cell: place for place, cell in enumerate(self.cells)}

    @cached_property
    def baseline(self) -> str:
        """The cell that the others are compared with."""
        return self.grid.baseline or next(iter(self.cells))

    def runs(self) -> Iterator[Run]:
        """All runs in their order."""
        for seed in self.grid.seeds:
            yield from self.runs_of(seed)

    def runs_of(self, seed: int) -> Iterator[Run]:
        """The runs of a seed in their order."""
        for cell in self.cells:
            yield self.run(cell, seed)

    def run(self, cell: str, seed: int) -> Run:
        """The run of a cell with a seed."""
        number = self.grid.seeds.index(seed) * len(self.cells) + self.places[cell]
        return Run(number, cell, seed, self.folder(cell, seed))

    def live(self, cell: str) -> bool:
        """True if the teachers of a cell run in every step by its settings."""
        given = overrides.by_field(self.settings) | overrides.by_field(self.cells[cell])
        return any(is_live(name, text) for name, text in given.items())

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
        filled = without_live(filled)
        recipe, teachers = filled.pop("recipe", ""), filled.pop("teachers", None)
        base = job.configure(recipe, without_live(self.settings)) if recipe else self.base
        rows = base.teachers
        if teachers is not None:
            rows = overrides.parse_teachers(teachers, rows)
        for name in filled:
            evaluates = name.startswith("eval.")
            check(not evaluates, printable(name, SHOWN), "the same in all cells", filled[name])
        cfg = overrides.build(base, overrides.by_field(filled), rows, ("recipe",))
        return replace(cfg, seed=seed, eval=replace(cfg.eval, on=False))

    def compared_with(self, cell: str) -> str:
        """The cell that a cell is compared with; empty for the baseline."""
        other = self.grid.against.get(cell, self.baseline)
        return "" if other == cell else other

    @cached_property
    def teaches_itself(self) -> list[str]:
        """The cells that have a run of this grid as their teacher."""
        return [name for name, row in self.cells.items() if PLACES[0] in row.get("teachers", "")]


def with_places(text: str, places: Mapping[str, str]) -> str:
    """Text with the places of `PLACES` filled."""
    for place, value in places.items():
        text = text.replace(place, value)
    return text


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
