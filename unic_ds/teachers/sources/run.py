"""Teachers that a run has trained: `run:PATH` of its folder, or of a model folder.

Tokens are those of the exported student: after the final norm, CLS or the mean of the patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from timm.models import VisionTransformer

from unic_ds import config
from unic_ds.config.job import student_folder
from unic_ds.models import ladder_description
from unic_ds.models.encoder import build_encoder, grid_of
from unic_ds.models.model_folder import WEIGHTS, ModelFolder
from unic_ds.teachers import licences
from unic_ds.teachers.adapters import TeacherModel, TimmViT
from unic_ds.teachers.sources.build import block_of, check_patch, vit_size
from unic_ds.teachers.sources.contract import Source


def read(row: config.Teacher, grid: int) -> TeacherModel:
    """The student with its weights, position embeddings resampled to the image side."""
    folder = folder_of(row)
    with naming(row):
        student = sized(row, folder.student, grid)
        return model_of(row, folder, student, folder.encoder(student.size))


def outline(row: config.Teacher, grid: int) -> TeacherModel:
    """The architecture without weights, on meta."""
    folder = folder_of(row)
    with naming(row), torch.device("meta"):
        student = sized(row, folder.student, grid)
        return model_of(row, folder, student, build_encoder(student))


def locate(row: config.Teacher) -> Path:
    """The weight file of the student."""
    return student_folder(row) / WEIGHTS


def own_size(row: config.Teacher) -> int:
    """Side in pixels of the images that the student was trained on."""
    folder = folder_of(row)
    with naming(row):
        return folder.student.size


def check_weights(row: config.Teacher, grid: int) -> None:
    """ValueError unless the weights have the names and shapes of the student that is described."""
    folder = folder_of(row)
    with naming(row):
        folder.check_encoder()


def folder_of(row: config.Teacher) -> ModelFolder:
    """The student's model folder; ValueError if there is none."""
    return ModelFolder(student_folder(row))


@contextmanager
def naming(row: config.Teacher) -> Iterator[None]:
    """Context manager that begins a ValueError with the teacher's name, unless it names it."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"teachers.{row.name}."):
            raise
        raise ValueError(f"teacher {row.name!r}: {error}") from None


def sized(row: config.Teacher, student: config.Student, grid: int) -> config.Student:
    """The student at the side that the row or the grid asks for; ValueError if it takes none."""
    patch = student.size // grid_of(student)
    check_patch(row, patch, "a run's student")
    found = replace(student, size=vit_size(row, grid, patch, student.size))
    try:
        grid_of(found)
    except ValueError as error:
        if not row.size:
            return student  # it takes its own size alone: its map is resized
        raise ValueError(
            f"teachers.{row.name}.size must be {student.size}, got {found.size}: {error}"
        ) from None
    return found


def model_of(
    row: config.Teacher, folder: ModelFolder, student: config.Student, encoder: VisionTransformer
) -> TeacherModel:
    """A student's encoder as a teacher."""
    # The student's features are without an attention pool, which was not trained.
    tower = TimmViT(encoder, block_of(row, len(encoder.blocks)), pooled=False)
    patch = encoder.patch_embed.patch_size[0]
    licence = licence_of(folder.path)
    return TeacherModel(tower, student.size, patch, student.mean, student.std, licence)


def licence_of(folder: Path) -> str:
    """The licences of a student's weights and of its teachers, joined by AND, as SPDX writes them.

    A teacher of unknown licence is `unknown`; empty if the folder does not name the teachers.
    """
    file = folder / ladder_description.FILE
    if not file.is_file():
        return ""
    found = ladder_description.read(file)
    of_teachers = [str(facts.get("licence") or "unknown") for facts in found.teachers.values()]
    texts = [*of_teachers, *filter(None, [found.licence])]
    return " AND ".join(dict.fromkeys(part for text in texts for part in licences.parts(text)))


SOURCE = Source(
    read=read,
    outline=outline,
    locate=locate,
    own_size=own_size,
    check_weights=check_weights,
)
