"""Models for the evaluators, from their names: rows of a recipe, sources, runs and model folders.

pixels                 grey thumbnails, the baseline without a model
dinov2                 a teacher of the settings, by its name
timm:NAME, KIND:REST   any source of a teacher, at the side that its weights were trained on
runs/full              a run: its student, or that of its newest checkpoint
runs/full/student      a model folder, also one that was imported
NAME=ANY               any of these under another name
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unic_ds import config, dist
from unic_ds.config.option import nearest
from unic_ds.config.teacher_source import KIND, TeacherSource
from unic_ds.evaluate import features
from unic_ds.evaluate.features import Model, ModelOutput, Outputs
from unic_ds.evaluate.utility import pruned_copy
from unic_ds.files.printable import printable
from unic_ds.harness.students import identity_of, read_student
from unic_ds.models.encoder import grid_of
from unic_ds.models.model_folder import CONFIG, WEIGHTS, ModelFolder
from unic_ds.process import console
from unic_ds.teachers import sources, weight_files
from unic_ds.teachers.teacher import Teacher, load
from unic_ds.tokens import Tokens, to_grid

NAME = re.compile(r"[\w.+ -]+")
"""Name that a model is given; a path or a source has other characters before its first `=`."""

Export = Callable[[Path], Path]
"""Exports the newest checkpoint of a run folder; returns the model folder. ValueError if none."""


@dataclass(frozen=True)
class ModelSpec:
    """A model's name in the table, and what it is read from."""

    name: str  # empty: the default
    text: str

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Parse `SPEC` or `NAME=SPEC`; an existing folder is no name."""
        name, equals, rest = text.strip().partition("=")
        named = equals and rest and NAME.fullmatch(name) and not Path(text).is_dir()
        return cls(name.strip(), rest.strip()) if named else cls("", text.strip())

    @property
    def is_source(self) -> bool:
        """True if it is a teacher's source, `KIND:REST`."""
        kind, colon, _ = self.text.partition(":")
        return bool(colon and KIND.fullmatch(kind))


def build(
    specs: Sequence[str], cfg: config.Config, device: torch.device, *, export: Export
) -> list[Model]:
    """The models that `specs` name, frozen and in fp32, in their order; every rank calls it.

    `cfg` has the teachers that may be named, the student whose grid their tokens have, and
    `eval.size`, which overrides the side of each model. `export` is called on rank 0 for a run that
    is not finished. ValueError, one sentence, for what cannot be evaluated, and for two models of
    one name.
    """
    models: list[Model] = []
    for spec in map(ModelSpec.parse, specs):
        try:
            model = build_one(spec, cfg, device, export=export)
        except ValueError as error:
            raise ValueError(f"model {printable(spec.text)!r}: {error}") from None
        if any(other.name == model.name for other in models):
            raise ValueError(
                f"two models are named {model.name!r}; name one, as in NAME={printable(spec.text)}"
            )
        models.append(model)
    return models


def build_one(
    spec: ModelSpec, cfg: config.Config, device: torch.device, *, export: Export
) -> Model:
    """The model that a spec names."""
    rows = {row.name: row for row in cfg.teachers}
    if spec.text == "pixels":
        model = features.pixels_model(cfg.eval.size or cfg.student.size)
        return replace(model, name=spec.name or model.name)
    if spec.text in rows:
        row = rows[spec.text]
        return read_teacher(spec.name or row.name, row, cfg, device)
    if spec.is_source:
        return read_source(spec, cfg, device)
    folder = Path(spec.text).expanduser()
    if not folder.is_dir():
        known = ["pixels", *rows]
        raise ValueError(
            f"it is no folder and none of {', '.join(known)}{nearest(spec.text, known)}; give a"
            " run, a model folder, a teacher's name or a source such as timm:NAME"
        )
    found = model_folder_of(folder, export)
    return read_student(
        spec.name or name_of(folder), ModelFolder(found), device, size=cfg.eval.size
    )


def model_folder_of(folder: Path, export: Export) -> Path:
    """The model folder that a folder is, or that of the run in it."""
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
        return folder
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"it is neither a model folder ({CONFIG} and {WEIGHTS}) nor a run (config.yaml)"
        )
    if (folder / "student" / WEIGHTS).is_file():
        return folder / "student"
    exported = dist.on_rank_0(lambda: export(folder))
    console.say(f"{printable(folder)} is not finished; its checkpoint is in {printable(exported)}")
    return exported


def name_of(folder: Path) -> str:
    """Default name of a run or a model folder: the run's, for a run's `student/`."""
    full = folder.absolute()
    inside = full.name == "student" and (full.parent / "config.yaml").is_file()
    return printable(full.parent.name if inside else full.name)


def source_rows(specs: Sequence[str], cfg: config.Config) -> list[config.Teacher]:
    """Rows of the specs that are sources; their names are those of the models' projections."""
    parsed = map(ModelSpec.parse, specs)
    return [row_of(spec, cfg) for spec in parsed if spec.is_source]


def row_of(spec: ModelSpec, cfg: config.Config) -> config.Teacher:
    """A row of a source, at the side that its weights were trained on."""
    source = TeacherSource.parse(spec.text, "a model")
    named = bool(config.TEACHER_NAME.fullmatch(spec.name))
    row = config.Teacher(name=spec.name if named else source.default_name, source=spec.text)
    return replace(row, size=cfg.eval.size or sources.own_size(row))


def read_source(spec: ModelSpec, cfg: config.Config, device: torch.device) -> Model:
    """A model of any teacher's source, at the side that its weights were trained on."""
    row = row_of(spec, cfg)
    source = row.parsed_source
    shown = source.rest
    if source.kind == "file":
        shown = source.without_folders.partition("#")[0].removeprefix("file:")
    elif source.kind == "run":
        shown = source.run_name
    name = spec.name or printable(shown)
    return read_teacher(name, row, cfg, device, own_grid=True)


def read_teacher(
    name: str,
    row: config.Teacher,
    cfg: config.Config,
    device: torch.device,
    *,
    own_grid: bool = False,
) -> Model:
    """The model of a recipe's row, in fp32: its tokens are the targets of a run.

    With `own_grid` its projection is on its own grid, not on the student's.
    """
    row = replace(row, precision="fp32", size=cfg.eval.size or row.size)
    try:
        teacher = load(row, grid=grid_of(cfg.student), device=device)
    except ValueError as error:
        if not cfg.eval.size:
            raise
        raise ValueError(f"--eval.size {cfg.eval.size}: {error}") from None
    return teacher_model(teacher, name, grid=teacher.own_grid if own_grid else teacher.grid)


def teacher_model(teacher: Teacher, name: str = "", *, grid: int = 0, freed: bool = False) -> Model:
    """A teacher as a model, in its own precision: patch tokens are on its own grid.

    Its projection, under the name of its row, is on a grid of side `grid` (0: the student's).
    `freed`: the model's `frees` frees the teacher, unless something else holds it.
    """
    held, grid = [teacher], grid or teacher.grid

    @torch.no_grad()
    def encode(image_B3HW: Tensor, needs: frozenset[ModelOutput]) -> Outputs:
        (own,) = held
        parts = image_B3HW.split(own.row.micro or len(image_B3HW))
        tokens = Tokens(*map(torch.cat, zip(*map(own.on_own_grid, parts), strict=True)))
        wanted = "projection" in needs
        return Outputs(*tokens, {own.name: to_grid(tokens, grid)} if wanted else None)

    def at(size: int) -> Model:
        (own,) = held
        row, on = replace(own.row, size=size), own.normalise.mean_311.device
        return teacher_model(load(row, grid=own.grid, device=on), name, grid=grid, freed=True)

    def pruned(share: float) -> Model:
        return teacher_model(pruned_copy(held[0], share), name, grid=grid, freed=True)

    # Sharded modules cannot be copied, nor quantised weights pruned.
    plain = teacher.row.placement == "replicate" and not teacher.row.quantised
    return Model(
        name or teacher.name,
        teacher.size,
        frozenset({"cls", "patch", "projection"}),
        encode,
        "teacher",
        identity=teacher_identity(teacher),
        at=at,
        patch=teacher.patch,
        frees=held.clear if freed else None,
        pruned=pruned if plain else None,
    )


def teacher_identity(teacher: Teacher) -> str:
    """Hash of a teacher's weights, preprocessing and precision; empty if its code is not known.

    The code of a `python:` source may change while its weights do not.
    """
    if not sources.has_outline(teacher.row):
        return ""
    facts = teacher.facts()
    known = weight_files.known_by(facts)
    kept = {k: v for k, v in facts.items() if k not in ("source", *weight_files.HASHES)}
    return identity_of(known, teacher.row.parsed_source.model, kept)
