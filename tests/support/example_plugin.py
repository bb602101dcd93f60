"""A plugin: a teacher source, a loss term and a balancer, each added by one entry of a registry."""

import torch
from small_teacher import Small
from torch import Tensor

from unic_ds import config
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


SOURCES["small"] = Source(read=read)
TERMS["charbonnier"] = charbonnier
BALANCERS["hardest"] = Hardest
