"""Description of a ladder (`ladder.json` of a model folder): its settings, heads and teachers.

    {"ladder": {settings}, "standardise": {settings},
     "teachers": {NAME: {"width": 768, "kinds": ["cls", "patch"], "rungs": "", facts}},
     "origin": "imported from FILE", "licence": "CC BY-NC-SA 4.0"}

The settings have the names of config.yaml's sections. The facts of a teacher are those of
teachers.json; its source is without the folders of the machine that it was written on. Origin and
licence are those of weights that no run has trained, so that every further export names them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unic_ds import config
from unic_ds.config import overrides, recipes
from unic_ds.config.block_choice import RungChoice
from unic_ds.files.documents import read_json
from unic_ds.files.printable import printable
from unic_ds.files.tensor_files import misfit
from unic_ds.models.ladder import Head, Ladder, heads_of
from unic_ds.tokens import KINDS

FILE = "ladder.json"
IMPORTED = ("origin", "licence")
WIDEST = 1_000_000
"""Channels of the widest teacher."""

CLS_HEAD = re.compile(rf"heads\.({config.TEACHER_NAME.pattern})\.cls\.(\d+)\.layers\.\d+\.weight")
PUBLISHED = config.Standardise(std_floor=0.0, target_clamp=0.0)
"""Standardisation of the published checkpoints (arXiv 2408.05088)."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """A ladder's settings and heads, and the standardisation of the targets that it predicts."""

    ladder: config.Ladder
    heads: Mapping[str, Head]
    """By the name of the teacher."""
    standardise: config.Standardise
    teachers: Mapping[str, Mapping[str, Any]]
    """Facts of each teacher, as far as they are known: the keys of teachers.json."""
    origin: str = ""
    """Text about the source of the weights, if no run has trained them."""
    licence: str = ""
    """Their licence then."""

    def text(self) -> str:
        """The content of `ladder.json`."""
        teachers = {
            name: {
                **self.teachers.get(name, {}),
                "width": head.width,
                "kinds": list(head.kinds),
                "rungs": head.rungs,
            }
            for name, head in self.heads.items()
        }
        sections = {key: overrides.to_dict(getattr(self, key)) for key in ("ladder", "standardise")}
        imported = {key: getattr(self, key) for key in IMPORTED if getattr(self, key)}
        return json.dumps(sections | {"teachers": teachers} | imported, indent=1) + "\n"


def of_run(cfg: config.Config, teachers: Mapping[str, Mapping[str, Any]]) -> Description:
    """The description of a run's ladder; `teachers` are the facts of its teachers.json."""
    sources = {row.name: row.parsed_source.without_folders for row in cfg.teachers}
    return Description(
        ladder=cfg.ladder,
        heads=heads_of(cfg, {name: int(facts["width"]) for name, facts in teachers.items()}),
        standardise=cfg.standardise,
        teachers={name: {**teachers[name], "source": text} for name, text in sources.items()},
    )


def of_older_run(run: Path) -> Description:
    """The description of a run's ladder, from its config.yaml and teachers.json; else ValueError.

    They are those of the run's last start.
    """
    cfg, file = recipes.read(run / "config.yaml"), run / "teachers.json"
    try:
        facts = mapping(read_json(file), "it")
        missing = [row.name for row in cfg.teachers if row.name not in facts]
        if missing:
            raise ValueError(f"it has no teacher {missing[0]}")
        rows = {row.name: mapping(facts[row.name], row.name) for row in cfg.teachers}
        for name, row in rows.items():
            check_width(name, row)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} describes no teachers: {error}") from None
    return of_run(cfg, rows)


def read(file: Path) -> Description:
    """Read the description of a model folder; ValueError, one sentence, if it is none."""
    try:
        plain = mapping(read_json(file), "it")
        sections = {key: plain.get(key, {}) for key in ("ladder", "standardise")}
        cfg = overrides.from_dict(sections)
        teachers = {
            name: mapping(row, printable(name, 60))
            for name, row in mapping(plain.get("teachers"), "teachers").items()
        }
        count = len(teachers)
        config.check(0 < count <= config.TEACHERS, "teachers", f"1 to {config.TEACHERS}", count)
        heads = {name: head_of(name, row) for name, row in teachers.items()}
        origin, licence = (text_at(plain, key) for key in IMPORTED)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} describes no ladder: {error}") from None
    return Description(
        ladder=cfg.ladder,
        heads=heads,
        standardise=cfg.standardise,
        teachers=teachers,
        origin=origin,
        licence=licence,
    )


def mapping(found: object, name: str) -> dict[str, Any]:
    """An object of a JSON file; ValueError for anything else."""
    config.check(isinstance(found, dict), name, "an object of JSON", found)
    assert isinstance(found, dict)
    return found


def text_at(plain: Mapping[str, Any], key: str) -> str:
    """A text of a JSON object, empty if it is missing; ValueError for anything else."""
    found = plain.get(key, "")
    config.check(isinstance(found, str), key, "a text", found)
    return str(found)


def head_of(name: str, row: Mapping[str, Any]) -> Head:
    """One teacher's outputs of the ladder; ValueError for values that none has."""
    valid = config.TEACHER_NAME.fullmatch(name)
    config.check(bool(valid), "a teacher's name", "letters, digits and _ (a-z first)", name)
    check_width(name, row)
    kinds, rungs = row.get("kinds", list(KINDS)), row.get("rungs", "")
    known = isinstance(kinds, list) and kinds in ([*KINDS], *([kind] for kind in KINDS))
    config.check(known, f"{name}.kinds", f"some of {', '.join(KINDS)}", kinds)
    config.check(isinstance(rungs, str), f"{name}.rungs", "a text", rungs)
    if rungs:
        RungChoice.parse(rungs, f"{name}.rungs")
    return Head(row["width"], tuple(kinds), rungs)


def check_width(name: str, row: Mapping[str, Any]) -> None:
    """ValueError unless a teacher's row has its number of channels."""
    width = row.get("width")
    valid = type(width) is int and 0 < width <= WIDEST
    config.check(valid, f"{name}.width", f"from 1 to {WIDEST}", width)


def derive(state: Mapping[str, Tensor], width: int, depth: int) -> Description:
    """The description of the ladder that these weights belong to, on an encoder of that shape.

    The standardisation, which is in no weight's shape, is taken to be that of the published
    checkpoints: channel by channel without a floor. ValueError as `ladder_of`.
    """
    ladder, heads = ladder_of(state, width, depth)
    return Description(ladder=ladder, heads=heads, standardise=PUBLISHED, teachers={})


def ladder_of(
    state: Mapping[str, Tensor], width: int, depth: int
) -> tuple[config.Ladder, dict[str, Head]]:
    """Find the settings and heads of the ladder that these weights belong to.

    ValueError if they are not those of projectors of two Linears for both kinds of token.
    """
    layers: dict[tuple[str, int], list[Tensor]] = {}
    for name, value in state.items():
        if found := CLS_HEAD.fullmatch(name):
            layers.setdefault((found[1], int(found[2])), []).append(value)
    linears = {at: [w for w in weights if w.ndim == 2] for at, weights in layers.items()}
    if not linears or any(len(pair) != 2 for pair in linears.values()):
        raise ValueError("the ladder has no projectors heads.TEACHER.cls.BLOCK of two Linears")
    teacher = next(iter(layers))[0]
    blocks = sorted(block for name, block in layers if name == teacher)
    norms = [w.ndim == 1 for w in layers[teacher, blocks[-1]]]
    cfg = config.Ladder(
        rungs=",".join(map(str, blocks)),
        width=linears[teacher, blocks[0]][0].shape[0],
        last_width=linears[teacher, blocks[-1]][0].shape[0],
        prenorm=norms[0],
        midnorm=any(norms[1:]),
    )
    heads = {name: Head(pair[1].shape[0]) for (name, _), pair in linears.items()}
    with torch.device("meta"):
        ladder = Ladder(width, depth, heads, cfg)
    if wrong := misfit(state, ladder.export_state_dict()):
        raise ValueError(f"the ladder is none of ours: {wrong}")
    return cfg, heads
