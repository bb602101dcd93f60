"""The science of a run as frozen values that cannot be wrong.

Stdlib only: options are checked before torch is imported, so a typo answers at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from unic_ds.config.data import Data
from unic_ds.config.models import EIGHT_BITS, TEACHER_NAME, Ladder, Student, Teacher
from unic_ds.config.objective import Balance, Distance, Drop, Loss, Standardise
from unic_ds.config.option import check, check_most, option
from unic_ds.config.schedule import Eval, Optim, Run

__all__ = [
    "EIGHT_BITS",
    "RECIPE_NAME",
    "TEACHER_NAME",
    "Balance",
    "Config",
    "Data",
    "Distance",
    "Drop",
    "Eval",
    "Ladder",
    "Loss",
    "Optim",
    "Run",
    "Standardise",
    "Student",
    "Teacher",
    "check",
    "knob",
]

RECIPE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
STAGES, TEACHERS = 100, 100


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a run learns."""

    recipe: str = option("", "name of the recipe this came from", machinery=True)
    seed: int = option(0, "of order, augmentation, drops and initial weights", most=2**64 - 1)
    precision: Literal["", "bf16", "fp32"] = option(
        "", "of the student; empty: what the ds_config says"
    )
    kernels: Literal["fused", "reference"] = option(
        "fused",
        "ladder, loss and statistics: by kernels (Triton on a GPU), or in plain torch to debug",
        machinery=True,
    )
    teachers: tuple[Teacher, ...] = option((), "comma-separated SOURCE or NAME=SOURCE")
    stages: str = option(
        "",
        "earlier stages, each as what differs from this run, in OUT/stage1 and so on; separated by"
        " ; as in 'student.size=224 optim.epochs=200'; each starts from the student before it",
    )
    cache: str = option(
        "",
        "folder that `unic-ds cache` made: teachers in it are not run, and its views are shown",
        machinery=True,  # the path may move; a checkpoint knows what it held
    )
    data: Data = Data()
    student: Student = Student()
    ladder: Ladder = Ladder()
    loss: Loss = Loss()
    balance: Balance = Balance()
    drop: Drop = Drop()
    standardise: Standardise = Standardise()
    optim: Optim = Optim()
    eval: Eval = Eval()
    run: Run = Run()

    def __post_init__(self) -> None:
        named = not self.recipe or RECIPE_NAME.fullmatch(self.recipe)
        check(bool(named), "recipe", "a name of letters, digits, _, +, - and .", self.recipe)
        check_most(self, "")
        check(self.seed >= 0, "seed", ">= 0", self.seed)
        stages, teachers = self.stages.count(";") + 1, len(self.teachers)
        check(stages <= STAGES, "stages", f"at most {STAGES}", stages)
        check(teachers <= TEACHERS, "teachers", f"at most {TEACHERS}", teachers)
        names = [t.name for t in self.teachers]
        check(
            len(set(names)) == len(names),
            "teachers' names",
            "different (write NAME=SOURCE)",
            ",".join(names),
        )
        where = self.data.val or self.data.val_share
        check(
            not (self.data.val and self.data.val_share),
            "data.val and data.val_share",
            "not both set",
            where,
        )
        for row in self.teachers:
            check(any(self.distance(row)), f"teachers.{row.name}'s losses", "not both none", "none")
            weighs = row.weight == 1 or self.balance.kind != "none"
            check(weighs, f"teachers.{row.name}.weight", "1 where balance.kind is none", row.weight)

    def distance(self, row: Teacher) -> Distance:
        """What that teacher is judged by."""
        cls, patch = row.cls_loss or self.loss.cls, row.patch_loss or self.loss.patch
        return replace(self.loss, cls=cls, patch=patch).distance

    @property
    def distances(self) -> dict[str, Distance]:
        """What each teacher is judged by."""
        return {row.name: self.distance(row) for row in self.teachers}
