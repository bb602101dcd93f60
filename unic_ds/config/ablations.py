"""Presets of `unic-ds ablate`: grids by name, as settings of cells.

`{out}` and `{seed}` in a value stand for the folder of the grid and the seed of a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from unic_ds.config import Config

Options = Mapping[str, str]
"""Dotted name -> text, as on a command line."""

Cells = Mapping[str, Options]
"""Name of a cell -> the settings in which it differs."""


@dataclass(frozen=True)
class Preset:
    """A grid that is known by name."""

    summary: str
    cells: Cells | Callable[[Config], Cells]
    """Or a function from the settings of all cells."""
    recipe: str = "quickstart"
    """Unless another one is given."""
    settings: Options = field(default_factory=dict)
    """Of all cells, unless others are given."""
    tasks: str = ""
    against: Mapping[str, str] = field(default_factory=dict)
    """Cell -> the cell that it is compared with, if that is not the first."""

    def cells_of(self, cfg: Config) -> Cells:
        """The cells for these settings; ValueError if they have none."""
        return self.cells(cfg) if callable(self.cells) else self.cells


def loss(formula: str) -> Options:
    """One formula for both kinds of token."""
    return {"loss.cls": formula, "loss.patch": formula}


def teacher_subsets(cfg: Config) -> Cells:
    """All teachers, all but one, and each alone; ValueError for fewer than two."""
    names = [row.name for row in cfg.teachers]
    if len(names) < 2:
        raise ValueError("the preset teachers needs two or more; give --teachers SOURCE,SOURCE")
    cells = {"all": {"teachers": ",".join(names)}}
    for left_out in names if len(names) > 2 else ():
        rest = [name for name in names if name != left_out]
        cells[f"without-{left_out}"] = {"teachers": ",".join(rest)}
    return cells | {f"only-{name}": {"teachers": name} for name in names}


def drawn_sides(cfg: Config) -> Cells:
    """The student's side alone, and drawn from 3/4, once and 5/4 of its patch grid."""
    found = re.search(r"patch(\d+)", cfg.student.model)
    patch = int(found[1]) if found else 16
    grid = cfg.student.size // patch
    grids = sorted({max(1, round(grid * share)) for share in (0.75, 1.0, 1.25)})
    sides = ",".join(str(patch * side) for side in grids)
    return {"fixed": {"data.sizes": ""}, "drawn": {"data.sizes": sides}}


def resized(cfg: Config) -> Cells:
    """Teachers on images that fit the student's grid, and on larger ones, whose map is resized.

    The larger side is twice the teacher's own `size`, or its pretrained input size.
    """
    cells: dict[str, Options] = {"image": {}}
    for kind in ("target", "larger"):
        cells[kind] = {
            f"teachers.{row.name}.{key}": text
            for row in cfg.teachers
            for key, text in (("resize", kind), ("size", str(2 * row.size)))
        }
    return cells


BIG = "big=run:{out}/big/seed{seed}"
TARGET = {"teachers.dinov2.resize": "target", "teachers.dinov2.size": "84"}
LARGER = {"teachers.dinov2.resize": "larger", "teachers.dinov2.size": "84"}
STANDARD = {"recipe": "quickstart+standard"}


def levers(cfg: Config) -> Cells:
    """The levers of docs/methods.md, each beside a run without it."""
    precise = {"teachers.big.precision": cfg.teachers[0].precision}
    return {
        "baseline": {},
        "lazy": {"drop.lazy": "true"},
        "no-dropping": {"balance.kind": "none"},
        "famo": {"balance.kind": "famo"},
        "mgda": {"balance.kind": "mgda"},
        "relational": {"loss.cls": "0.5 cosine + 0.5 smooth_l1 + relational"},
        "effnet-patch-2": {"teachers.effnet.patch_loss": "1 cosine + 1 smooth_l1"},
        "standard-cosine": STANDARD | {"loss.cls": "cosine"},
        "dispersion": STANDARD | {"loss.cls": "dispersion"},
        "resize-target": TARGET,
        "resize-larger": LARGER,
        "multi-resolution": {"data.sizes": "32,48,64"},
        "online": {"teachers.cache": "none"},
        "shift": {"loss.shift": "1"},
        "big": {"student.heads": "0", "student.mlp_width": "0"},
        "from-big": {"teachers": BIG} | precise,
        "big-and-teachers": {"teachers": f"{BIG},effnet,dinov2"} | precise,
    }


SLIM = {
    "student.size": "48",
    "student.heads": "1",
    "student.mlp_width": "192",
    "ladder.rungs": "5,11",
    "ladder.last_width": "192",
    "optim.batch_size": "32",
    "data.threads": "1",
    "run.save_every": "0",
}
"""A ViT-Ti of a third of its width inside the blocks, on small images."""

SHORT = SLIM | {"teachers.dinov2.size": "42", "optim.epochs": "2", "eval.sizes": "32,64"}
"""The quickstart in about a minute of one core."""

SMALL = SLIM | {
    "student.model": "vit_tiny_patch16_224",
    "student.registers": "-1",
    "student.init": "",
    "precision": "fp32",
    "stages": "",
    "data.sizes": "",
    "data.tokens": "0",
    "data.size_draw": "shared",
    "optim.steps": "120",
    "optim.warmup_epochs": "0",
}
"""A run of any recipe in about a minute of one core, once its teachers' features are stored."""

PLAIN = {"standardise.on": "false", "balance.kind": "none", "ladder.rungs": "last"}

PRESETS: dict[str, Preset] = {
    "components": Preset(
        "the parts of UNIC, one after another: standardised targets, ladder, teacher dropping",
        {
            "plain": PLAIN,
            "standardised": PLAIN | {"standardise.on": "true"},
            "ladder": {"standardise.on": "true", "balance.kind": "none"},
            "dropping": {"standardise.on": "true", "balance.kind": "dropping"},
        },
    ),
    "losses": Preset(
        "squared error against cosine, smooth L1 and both",
        {
            "both": loss("0.5 cosine + 0.5 smooth_l1"),
            "mse": loss("mse"),
            "cosine": loss("cosine"),
            "smooth_l1": loss("smooth_l1"),
        },
    ),
    "projectors": Preset(
        "architecture of the projectors",
        {kind: {"ladder.projector": kind} for kind in ("mlp", "linear", "transformer")},
    ),
    "rungs": Preset(
        "student blocks with projectors",
        {rungs: {"ladder.rungs": rungs} for rungs in ("last", "half", "all")},
    ),
    "drop": Preset(
        "rate of teacher dropping, and lazy dropping",
        {f"p{rate}": {"drop.rate": rate} for rate in ("0", "0.25", "0.5", "0.75")}
        | {"lazy0.5": {"drop.rate": "0.5", "drop.lazy": "true"}},
    ),
    "teachers": Preset("all teachers, all but one, and each alone", teacher_subsets),
    "balancers": Preset(
        "balance of the teachers",
        {kind: {"balance.kind": kind} for kind in ("none", "dropping", "adaloss", "famo", "mgda")},
    ),
    "resolutions": Preset("one image size, and several drawn by step", drawn_sides),
    "resize": Preset("teachers at the student's grid, and at larger sides", resized),
    "levers": Preset(
        "the levers of docs/methods.md on a shortened quickstart",
        levers,
        settings=SHORT,
        tasks="knn,resolutions,teacher",
        against={
            "famo": "no-dropping",
            "mgda": "no-dropping",
            "standard-cosine": "no-dropping",
            "dispersion": "standard-cosine",
            "resize-larger": "resize-target",
            "shift": "online",
        },
    ),
}
"""By name; `unic-ds ablate --help` lists them."""
