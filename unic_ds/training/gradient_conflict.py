"""Cosines between the gradients of the teachers' losses at a student's last features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import Tensor

from unic_ds import config, dist
from unic_ds.analysis.comparison import cosines
from unic_ds.config import recipes
from unic_ds.evaluate.features import FILLER, EvalBatch, ImageSet, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.files.printable import printable
from unic_ds.harness import models
from unic_ds.harness.students import Statistics, read_statistics
from unic_ds.losses.distill import distill_loss
from unic_ds.losses.mgda import Mgda
from unic_ds.models.encoder import grid_of, has_cls, residuals
from unic_ds.models.ladder import Ladder
from unic_ds.models.model_folder import ModelFolder
from unic_ds.tokens import Normalise, Shared, Tokens, to_grid

IMAGES = 128
"""Images that the gradients are of, spread over the sample."""
PROJECTION: frozenset[ModelOutput] = frozenset({"projection"})


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """A student with its ladder, and the losses that it was trained by."""

    cfg: config.Config
    student: config.Student
    encoder: VisionTransformer
    ladder: Ladder
    statistics: Statistics
    names: Sequence[str]
    """Teachers that it predicts and that are compared."""

    def measure(self, teachers: Sequence[Model], images: ImageSet) -> dict[str, Any]:
        """Cosines as JSON; every rank calls it.

        Gradients are those that `--balance.kind mgda` compares (`losses.mgda`), so their inner
        products are summed over images and tokens.
        """
        named = [model for model in teachers if model.name in self.names]
        count = min(IMAGES, len(images))
        only = np.unique(np.linspace(0, len(images) - 1, count).astype(np.int64))
        sums = Mgda(torch.ones(len(named), device=dist.device()), 0.0).to(dist.device())
        with raised_on_all_ranks("the teachers' gradients", "lower --eval.batch"):
            for batch in images.batches([self.student.size, *(x.size for x in named)], only):
                self.add(batch, named, sums)
        gram_TT, used = (dist.all_reduce_sum(x).cpu() for x in (sums.sum_TT, sums.images))
        rows = [[float(x) if x.isfinite() else None for x in row] for row in cosines(gram_TT)]
        return {"teachers": [x.name for x in named], "images": int(used), "cosine": rows}

    def add(self, batch: EvalBatch, teachers: Sequence[Model], sums: Mgda) -> None:
        """Add the inner products of a batch's gradients."""
        counted_B = torch.from_numpy(batch.place_B != FILLER).to(dist.device())
        if not counted_B.any():
            return
        grid, targets = grid_of(self.student), {}
        for teacher in teachers:
            (tokens,) = (
                teacher.encode(batch.images[teacher.size], PROJECTION).projection or {}
            ).values()
            kept = Tokens(*(x[counted_B] for x in to_grid(tokens, grid)))
            targets[teacher.name] = self.statistics[teacher.name](kept)
        shared = self.predict(batch.images[self.student.size][counted_B])
        pred = {name: shared.pred[name] for name in targets}
        distill_loss(
            pred,
            targets,
            torch.zeros(len(targets), int(counted_B.sum()), device=dist.device()),
            loss=self.cfg.loss,
            balance=sums,
            distances=self.cfg.distances,
            shared=shared._replace(pred=pred),
        )

    def predict(self, image_B3HW: Tensor) -> Shared:
        """The last block's tokens and the predictions, in a graph that begins at the former."""
        normalise = Normalise(self.student.mean, self.student.std).to(image_B3HW.device)
        with torch.no_grad():
            x_B3HW = normalise(image_B3HW, torch.float32)
            states = residuals(self.encoder, x_B3HW, self.ladder.blocks)
        patch_BND = states[-1].patch_BNC.detach().requires_grad_()
        # Without a CLS token the mean of the patches takes its place: its gradient is theirs.
        own = has_cls(self.encoder)
        cls_BD = states[-1].cls_BC.detach().requires_grad_() if own else patch_BND.mean(1)
        pred = self.ladder([*states[:-1], Tokens(cls_BD, patch_BND)])
        return Shared((cls_BD, patch_BND)[not own :], pred)


def open_student(path: Path, cfg: config.Config) -> Conflict:
    """The student of a finished run or of a model folder, for at least two of the teachers.

    Its losses are those of its run, or else of `cfg`. ValueError if it cannot be used.
    """
    shown = printable(path)
    try:
        folder = ModelFolder(models.model_folder_of(path, not_finished))
        encoder = folder.encoder()
        description = folder.description(encoder)
        if isinstance(description, str):
            raise ValueError(f"it has no predictions of its teachers' features: {description}")
        names = [row.name for row in cfg.teachers if row.name in description.heads]
        if len(names) < 2:
            known = ", ".join(map(printable, description.heads))
            raise ValueError(f"it predicts {known}; name two of these in --teachers")
        own = recipes.read(folder.run / "config.yaml") if folder.run else cfg
        check_same_teachers([row for row in cfg.teachers if row.name in names], own)
        statistics = read_statistics(folder, description, dist.device())
    except ValueError as error:
        raise ValueError(f"--student {shown!r}: {error}") from None
    return Conflict(
        cfg=own,
        student=folder.student,
        encoder=encoder.to(dist.device()),
        ladder=folder.ladder(encoder, description).to(dist.device()),
        statistics=statistics,
        names=names,
    )


def check_same_teachers(rows: Sequence[config.Teacher], own: config.Config) -> None:
    """Raise ValueError unless these are the teachers of a run, which all see every image alike."""
    known = {row.name: row for row in own.teachers}
    for row in rows:
        of_run = known.get(row.name, row)
        if (of_run.source, of_run.block) != (row.source, row.block):
            raise ValueError(
                f"its teacher {printable(row.name)} is block {of_run.block} of"
                f" {printable(of_run.source)}, not {row.block} of {printable(row.source)}; leave"
                " --teachers out, or give the other one another name"
            )
        if of_run.data or own.loss.tokens:
            raise ValueError(
                "its losses differ by the source of an image (loss.tokens, teachers.NAME.data),"
                " which the images of a comparison do not have; leave --student out"
            )


def not_finished(run: Path) -> Path:
    """Refuse a run without a `student/`."""
    raise ValueError(
        f"the run is not finished; start its command again, or export its newest checkpoint"
        f" (`unic-ds export {printable(run)}`) and give that folder"
    )
