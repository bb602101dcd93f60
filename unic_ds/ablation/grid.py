"""Grids of settings: read from a YAML file, a preset's name or axes on the command line."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unic_ds.config import eval_spec, job, recipes
from unic_ds.config.ablations import PRESETS
from unic_ds.config.option import SHOWN, check, nearest
from unic_ds.config.overrides import flatten, plain_value
from unic_ds.files.documents import read_yaml
from unic_ds.files.printable import printable

ASK_OVER, MOST = 200, 100_000
"""Runs that are not started without --yes, and the most of a grid."""

CELL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,79}")
LONGEST_NAME = 60
"""Characters of a cell's name that is made from its settings."""

KEYS = ("recipe", "settings", "cells", "axes", "seeds", "tasks", "baseline", "against")
RESERVED = ("features", "eval", "pixels")
"""Names of folders beside those of the cells, and the name of a model."""

LIVE, CACHE = "none", ("cache", "teachers.cache")
"""Value with which teachers run in every step, which is no folder, and names of its option."""

Options = dict[str, str]
"""Dotted name -> text, as on a command line."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells of settings, and how they are compared."""

    name: str
    recipe: str = "quickstart"
    settings: Options = field(default_factory=dict)
    """Of all cells."""
    cells: Mapping[str, Options] = field(default_factory=dict)
    axes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Setting -> values; each combination is a further cell."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: str = "knn,linear"
    baseline: str = ""
    """The cell that others are compared with; empty: the first."""
    against: Mapping[str, str] = field(default_factory=dict)
    """Cell -> another one that it is compared with."""

    @property
    def count(self) -> int:
        """Number of cells; nothing is built."""
        product = math.prod(len(values) for values in self.axes.values()) if self.axes else 0
        return len(self.cells) + product

    @property
    def runs(self) -> int:
        """Number of runs: cells times seeds."""
        return self.count * len(self.seeds)

    def all_cells(self) -> dict[str, Options]:
        """All cells by name, those of the axes last; ValueError for two of one name."""
        found = {name: dict(options) for name, options in self.cells.items()}
        for values in itertools.product(*self.axes.values()) if self.axes else ():
            options = dict(zip(self.axes, values, strict=True))
            name = name_of(options)
            if name in found:
                name = next(n for i in itertools.count(2) if (n := f"{name}_{i}") not in found)
            found[name] = options
        return found


def name_of(options: Mapping[str, str]) -> str:
    """Name of a cell by its settings: the end of each name, and its value."""
    ends = [name.rpartition(".")[2] for name in options]
    keys = [end if ends.count(end) == 1 else name for end, name in zip(ends, options, strict=True)]
    pairs = (f"{key}-{text or 'none'}" for key, text in zip(keys, options.values(), strict=True))
    text = re.sub(r"[^A-Za-z0-9_.+]+", "-", "_".join(pairs)).strip("-.+")
    return text[:LONGEST_NAME] or "cell"


def read(
    words: Sequence[str], overrides: Mapping[str, str], *, seeds: str = "", tasks: str = ""
) -> Grid:
    """The grid that the words of a command line name; its options replace those of the grid.

    ValueError, one sentence, for one that cannot be read.
    """
    options = dict(overrides)
    recipe = options.pop("recipe", "")
    if all("=" in word for word in words) and job.kind_of(words[0]) != "file":
        plain: dict[str, Any] = {"axes": axes_of(words)}
        name = "_".join(plain["axes"])
    elif len(words) > 1:
        raise ValueError(
            f"{printable(words[1])!r} follows a grid's name; give one file or preset, or axes as in"
            " drop.rate=0,0.25"
        )
    elif Path(words[0]).suffix in recipes.YAML:
        plain, name = read_file(Path(words[0])), Path(words[0]).stem
    else:
        plain, name = of_preset(words[0], recipe, options), words[0]
    plain |= {key: text for key, text in (("seeds", seeds), ("tasks", tasks)) if text}
    plain |= {"recipe": recipe} if recipe else {}
    return parse(plain, name=name, settings=options)


def axes_of(words: Sequence[str]) -> dict[str, list[str]]:
    """Axes of words `setting=value,value`, or `setting=value;value` if values have commas."""
    axes: dict[str, list[str]] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name in axes:
            raise ValueError(f"the axis {printable(name)!r} is given twice; give it once")
        axes[name] = [part.strip() for part in text.split(";" if ";" in text else ",")]
    return axes


def read_file(file: Path) -> dict[str, Any]:
    """The mapping of a YAML file; ValueError for anything else."""
    try:
        plain = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} cannot be read as a grid: {error}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{str(file)!r} holds no grid; give a mapping of {', '.join(KEYS)}")
    return plain


def of_preset(name: str, recipe: str, options: Mapping[str, str]) -> dict[str, Any]:
    """The mapping of a preset; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(
            f"there is no grid {printable(name)!r}{nearest(name, PRESETS)}; give a .yaml file, axes"
            f" as in drop.rate=0,0.25, or one of {', '.join(PRESETS)}"
        )
    preset = PRESETS[name]
    recipe = recipe or preset.recipe
    settings = dict(preset.settings)
    cells = preset.cells_of(job.configure(recipe, without_live(settings | dict(options))))
    plain = {"recipe": recipe, "settings": settings, "cells": cells, "against": preset.against}
    return plain | ({"tasks": preset.tasks} if preset.tasks else {})


def is_live(name: str, text: str) -> bool:
    """True for the option by which teachers run in every step."""
    return name in CACHE and text.lower() == LIVE


def without_live(options: Mapping[str, str]) -> Options:
    """The options, with no feature cache in place of `LIVE`."""
    return {name: "" if is_live(name, text) else text for name, text in options.items()}


def parse(plain: Mapping[str, Any], *, name: str, settings: Mapping[str, str]) -> Grid:
    """The grid of plain values; `settings` replace its own. ValueError for what is illegal."""
    for key in plain:
        if key not in KEYS:
            raise ValueError(
                f"a grid has no {printable(key, SHOWN)!r}{nearest(key, KEYS)}; it has"
                f" {', '.join(KEYS)}"
            )
    cells = {key: options_of(row, f"cell {key}") for key, row in table(plain, "cells").items()}
    axes = {key: values_of(row, key) for key, row in table(plain, "axes").items()}
    seeds, tasks = (plain.get(key) for key in ("seeds", "tasks"))
    found = Grid(
        name=name,
        recipe=str(plain.get("recipe") or "quickstart"),
        settings=options_of(table(plain, "settings"), "settings") | dict(settings),
        cells=cells,
        axes=axes,
        seeds=Grid.seeds if seeds is None else seeds_of(seeds),
        tasks=Grid.tasks if tasks is None else text_of(tasks),
        baseline=str(plain.get("baseline") or ""),
        against={key: str(value) for key, value in table(plain, "against").items()},
    )
    check_grid(found)
    return found


def check_grid(grid: Grid) -> None:
    """Raise ValueError for a grid without cells, or with an illegal name or task."""
    if not grid.count:
        raise ValueError("the grid has no cells; give cells, or axes with values")
    if not grid.settings.get("plugins"):  # which may add tasks
        eval_spec.tasks(grid.tasks)
    for cell in grid.cells:
        valid = bool(CELL_NAME.fullmatch(cell)) and cell not in RESERVED
        names = f"letters, digits, _, +, - and . (at most 80, not {', '.join(RESERVED)})"
        check(valid, "a cell's name", names, cell)
    varied = {*grid.axes, *(name for options in grid.cells.values() for name in options)}
    check("seed" not in {*varied, *grid.settings}, "seed", "given as --seeds 0,1,2", "a setting")
    check("plugins" not in varied, "plugins", "the same in all cells", "a setting of cells")


def check_count(grid: Grid, *, yes: bool) -> None:
    """Raise ValueError for more runs than `ASK_OVER` without `yes`, or than `MOST`."""
    counted = f"{grid.count:,} cells x {len(grid.seeds)} seeds are {grid.runs:,} runs"
    if grid.runs > MOST:
        raise ValueError(f"{counted}, more than {MOST:,}; give fewer values")
    if grid.runs > ASK_OVER and not yes:
        raise ValueError(f"{counted}; add --yes true if that is meant, or give fewer values")


def table(plain: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping inside a grid, empty if it is missing; ValueError for anything else."""
    found = plain.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{key} of a grid must be a mapping, got {printable(repr(found), SHOWN)}")
    return found


def options_of(plain: object, where: str) -> Options:
    """Dotted names and texts of nested settings; none for an empty value."""
    if plain is None:
        return {}
    if not isinstance(plain, Mapping):
        shown = printable(repr(plain), SHOWN)
        raise ValueError(f"{printable(where)} must be a mapping of settings, got {shown}")
    for name, value in plain.items():
        if value is None:
            shown = printable(name, SHOWN)
            raise ValueError(f"{shown} has no value; give one, or '' for none")
    return flatten(dict(plain))


def text_of(value: object) -> str:
    """A value as on a command line: a list with commas, true and false in small letters."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(text_of, value))
    return str(value)


def values_of(values: object, name: str) -> tuple[str, ...]:
    """The values of an axis; ValueError unless they are several different ones in a list."""
    known = isinstance(values, list | tuple) and all(
        plain_value(x) or isinstance(x, list) for x in values
    )
    texts = tuple(map(text_of, values)) if known else ()  # type: ignore[call-overload]
    shown = printable(repr(values), SHOWN)
    if not texts or len(set(texts)) < len(texts):
        raise ValueError(
            f"the axis {printable(name, SHOWN)} must be a list of different values, got {shown}"
        )
    return texts


def seeds_of(value: object) -> tuple[int, ...]:
    """Seeds; ValueError unless they are different whole numbers."""
    parts = [part.strip() for part in text_of(value).split(",")]
    valid = all(part.isascii() and part.isdecimal() and len(part) < 20 for part in parts)
    valid = valid and len(set(map(int, parts))) == len(parts)
    check(valid, "seeds", "different whole numbers, as in 0,1,2", value)
    return tuple(map(int, parts))
