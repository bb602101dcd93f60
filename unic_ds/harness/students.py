"""Students as models under evaluation: features, and predictions of the teachers' features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from unic_ds import config, dist
from unic_ds.evaluate.comparison import Role
from unic_ds.evaluate.features import Model, ModelOutput, Outputs
from unic_ds.evaluate.utility import pruned_copy
from unic_ds.files.tensor_files import misfit
from unic_ds.models.encoder import features, residuals
from unic_ds.models.ladder import Ladder
from unic_ds.models.ladder_description import Description
from unic_ds.models.model_folder import STATISTICS, ModelFolder, encoder_of
from unic_ds.models.student import Student
from unic_ds.process import console
from unic_ds.teachers import weight_files
from unic_ds.teachers.standardise import Standardiser
from unic_ds.teachers.teacher_set import KINDS
from unic_ds.tokens import Normalise, Tokens

Statistics = Mapping[str, Standardiser]
"""Standardisation of each teacher's features, by the teacher's name."""


@dataclass(frozen=True, kw_only=True)
class StudentParts:
    """A student's encoder, and its ladder with the statistics that its targets had.

    The encoder may be in training: whoever calls it puts it into evaluation mode.
    """

    cfg: config.Student
    encoder: VisionTransformer
    ladder: Ladder | None = None
    statistics: Statistics | None = None

    @cached_property
    def normalise(self) -> Normalise:
        """The normalisation of its images, on its device."""
        device = self.encoder.patch_embed.proj.weight.device
        return Normalise(self.cfg.mean, self.cfg.std).to(device)

    @torch.no_grad()
    def outputs(self, image_B3HW: Tensor, needs: frozenset[ModelOutput]) -> Outputs:
        """Features of uint8 images after the final norm, and the predictions, as far as needed."""
        x_B3HW = self.normalise(image_B3HW, self.encoder.patch_embed.proj.weight.dtype)
        found = Outputs(projection=self.project(x_B3HW) if "projection" in needs else None)
        if not needs & {"cls", "patch"}:
            return found
        return found._replace(**features(self.encoder, x_B3HW)._asdict())

    def project(self, x_B3HW: Tensor) -> dict[str, Tokens]:
        """Predicted features of each teacher, of normalised images.

        The ladder's predictions with the standardisation undone; the clamp of the targets cannot
        be. A ladder with a loss per rung (`combine = each`) predicts the whole target at each: the
        last one's prediction counts, which sees all blocks. A kind of token that is not learned is
        an empty tensor.
        """
        assert self.ladder is not None and self.statistics is not None
        pred = self.ladder(residuals(self.encoder, x_B3HW, self.ladder.blocks))
        if self.ladder.cfg.combine == "each":
            pred = {k: Tokens(*(x[-1] if len(x) else x for x in y)) for k, y in pred.items()}
        return {name: norm.undo(pred[name]) for name, norm in self.statistics.items()}

    def resized(self, size: int) -> StudentParts:
        """The same student for images of another side, with an encoder of its own."""
        check_side(size, self.encoder, name=self.cfg.model)
        cfg, weight = replace(self.cfg, size=size), self.encoder.patch_embed.proj.weight
        encoder = encoder_of(cfg, self.encoder.state_dict(), "the student")
        return replace(self, cfg=cfg, encoder=encoder.to(weight.device, weight.dtype))


def student_model(
    name: str,
    student: Student,
    cfg: config.Student,
    *,
    statistics: Statistics | None = None,
    role: Role = "student",
) -> Model:
    """A live student as a model; with `statistics` (`TeacherSet.norms`) it has projections.

    It reads weights and statistics as they are at each call; the caller puts the student into
    evaluation mode, and gathers its weights under ZeRO-3.
    """
    parts = StudentParts(
        cfg=cfg,
        encoder=student.encoder,
        ladder=student.ladder if statistics else None,
        statistics=statistics,
    )
    return model_of(name, parts, role=role)


def model_of(
    name: str,
    parts: StudentParts,
    *,
    size: int = 0,
    role: Role = "student",
    weights: str = "",
    freed: bool = False,
) -> Model:
    """A student as a model for images of `size` px (0: the student's own).

    `weights` identifies all that its outputs depend on beside `parts.cfg`, empty: not to be
    cached. `freed`: the model's `frees`
    frees an encoder that was made for its side.
    """
    held = [parts.resized(size) if size else parts]
    cfg = held[0].cfg

    def encode(image_B3HW: Tensor, needs: frozenset[ModelOutput]) -> Outputs:
        return held[0].outputs(image_B3HW, needs)

    def at(size: int) -> Model:
        return model_of(name, parts, size=size, role=role, weights=weights, freed=True)

    def pruned(share: float) -> Model:
        (own,) = held
        copy = replace(own, encoder=pruned_copy(own.encoder, share))
        return model_of(name, copy, role=role, freed=True)

    known: frozenset[ModelOutput] = frozenset({"cls", "patch"})
    dtype = str(parts.encoder.patch_embed.proj.weight.dtype)
    return Model(
        name,
        cfg.size,
        known | {"projection"} if parts.ladder and parts.statistics else known,
        encode,
        role,
        identity=identity_of(weights, cfg.model, cfg.mean, cfg.std, cfg.size, dtype),
        at=at,
        patch=parts.encoder.patch_embed.patch_size[0],
        frees=held.clear if freed else None,
        pruned=pruned,
    )


def identity_of(weights: str, *facts: object) -> str:
    """Hash of a model by the hash of its weights; empty if that is not known."""
    return hashlib.sha256(json.dumps([weights, *facts]).encode()).hexdigest() if weights else ""


def check_side(size: int, encoder: VisionTransformer, *, name: str) -> None:
    """ValueError unless images of `size` px are whole patches."""
    patch = encoder.patch_embed.patch_size[0]
    if size <= 0 or size % patch:
        raise ValueError(f"{name} takes images whose side is a multiple of {patch} px, not {size}")


def read_student(name: str, folder: ModelFolder, device: torch.device, *, size: int = 0) -> Model:
    """The student of a model folder in fp32; ValueError unless all of it fits together.

    If its ladder is not known, it has no projections, and a line says why.
    """
    hashes = dist.on_rank_0(lambda: {k: weight_files.hashes(v) for k, v in folder.files.items()})
    parts = StudentParts(cfg=folder.student, encoder=folder.encoder())
    description = folder.description(parts.encoder)
    if isinstance(description, str):
        console.say(f"{name} has no predictions of its teachers' features: {description}")
    else:
        ladder = folder.ladder(parts.encoder, description).to(device)
        statistics = read_statistics(folder, description, device)
        parts = replace(parts, ladder=ladder, statistics=statistics)
    parts = replace(parts, encoder=parts.encoder.to(device))
    weights = ",".join(f"{k} {weight_files.known_by(row)}" for k, row in sorted(hashes.items()))
    if isinstance(description, Description):  # its settings decide the projections
        weights += "\n" + description.text()
    return model_of(name, parts, size=size, weights=weights)


def read_statistics(
    folder: ModelFolder, description: Description, device: torch.device
) -> Statistics:
    """The statistics of a model folder; ValueError unless they are of the ladder's teachers."""
    state = folder.tensors(STATISTICS)
    with torch.device("meta"):
        outline = empty_statistics(description)
    if wrong := misfit(state, nn.ModuleDict(outline).state_dict()):
        raise ValueError(f"{folder.named}: {STATISTICS} does not fit the ladder: {wrong}")
    norms = empty_statistics(description)
    nn.ModuleDict(norms).load_state_dict(dict(state))
    return {name: norm.to(device) for name, norm in norms.items()}


def empty_statistics(description: Description) -> dict[str, Standardiser]:
    """Initial statistics of a ladder's teachers; ValueError for a width that PHI-S has none for."""
    cfg = description.standardise
    kind = KINDS[cfg.kind if cfg.on else "channel"]
    return {name: kind(head.width, cfg) for name, head in description.heads.items()}
