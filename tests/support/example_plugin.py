"""A plugin: a teacher source, a loss term, a balancer, an evaluator and a recipe.

Each is added by one entry of a registry.
"""

from collections.abc import Iterator, Sequence

import torch
from small_teacher import Small
from torch import Tensor

from unic_ds import config, dist
from unic_ds.config.recipes import RECIPES
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import FILLER, Model
from unic_ds.evaluate.registry import EVALUATORS
from unic_ds.losses.balance import BALANCERS, Balancer
from unic_ds.losses.terms import TERMS, Context
from unic_ds.teachers.adapters import PythonTower, TeacherModel
from unic_ds.teachers.sources import SOURCES
from unic_ds.teachers.sources.contract import Source


def read(row: config.Teacher, grid: int) -> TeacherModel:
    """`small:WIDTH`: a teacher of one layer."""
    width = row.parsed_source.rest
    if not width.isdecimal():
        raise ValueError(f"teachers.{row.name}.source must be small:WIDTH, got {row.source!r}")
    model = Small(int(width))
    size = row.size or grid * model.patch_size
    return TeacherModel(PythonTower(model), size, model.patch_size, model.mean, model.std, "MIT")


def charbonnier(pred_BNC: Tensor, target_BNC: Tensor, _: Context) -> Tensor:
    """sqrt(gap^2 + 1e-6), averaged over channels."""
    return ((pred_BNC - target_BNC).square() + 1e-6).sqrt().mean(-1)


class Hardest(Balancer):
    """Only the teacher with the largest loss on an image counts."""

    def share(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        hardest_TB = torch.zeros_like(loss_TB).scatter(0, loss_TB.argmax(0, keepdim=True), 1.0)
        return hardest_TB / loss_TB.shape[1]


class PatchRank:
    """Effective rank of the patch tokens (RankMe, arXiv 2210.02885): it needs no labels."""

    model_needs = frozenset({"patch"})
    data_needs = frozenset()

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `patch_rank` of each model, from a pass of its own over the validation images."""
        for model in models:
            square_CC, images = torch.zeros(()), torch.zeros(())
            for batch in data.val.batches([model.size]):
                counted_B = torch.from_numpy(batch.place_B != FILLER)
                patch_BNC = model.encode(batch.images[model.size], self.model_needs).patch_BNC
                patch_MC = patch_BNC[counted_B].flatten(0, 1).detach().double()
                square_CC = square_CC + patch_MC.T @ patch_MC
                images += counted_B.sum()
            value_C = torch.linalg.eigvalsh(dist.all_reduce_sum(square_CC)).clamp(min=0).sqrt()
            part_C = value_C / value_C.sum() + 1e-7
            rank = float((-part_C * part_C.log()).sum().exp())
            count = int(dist.all_reduce_sum(images))
            yield Score(model.name, "patch_rank", rank, f"patch_rank of {count} validation images")


def example() -> config.Config:
    """A recipe of the parts above."""
    return config.Config(
        plugins=(__name__,),
        teachers=(
            config.Teacher(name="mine", source="small:24"),
            config.Teacher(name="theirs", source="python:small_teacher:wide"),
        ),
        loss=config.Loss(cls="0.5 cosine + 0.5 charbonnier"),
        balance=config.Balance(kind="hardest"),
    )


SOURCES["small"] = Source(read=read)
TERMS["charbonnier"] = charbonnier
BALANCERS["hardest"] = Hardest
EVALUATORS["patch_rank"] = PatchRank()
RECIPES["example"] = example
