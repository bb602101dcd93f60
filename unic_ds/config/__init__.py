"""The options of a run, as frozen dataclasses that validate themselves.

Stdlib only: options are checked before torch is imported, so a typo is reported at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from unic_ds.config import loss_terms
from unic_ds.config import stages as stages_of
from unic_ds.config.data import Data
from unic_ds.config.evaluation import PROBES, Eval, Probe
from unic_ds.config.models import EIGHT_BITS, TEACHER_NAME, Ladder, Student, Teacher
from unic_ds.config.objective import MGDA_TEACHERS, Balance, Distance, Drop, Loss, Standardise
from unic_ds.config.option import check, check_most, option
from unic_ds.config.plugins import check_names
from unic_ds.config.schedule import Optim, Run
from unic_ds.config.stages import Stage

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
    "Probe",
    "Run",
    "Standardise",
    "Student",
    "Teacher",
    "check",
    "option",
]

RECIPE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
TEACHERS = 100
"""The most teachers of a run."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run: those that decide its result, and its machinery."""

    recipe: str = option("", "name of the recipe this came from", machinery=True)
    seed: int = option(
        0,
        "seed of the sample order, augmentation, teacher dropping, drop path and initial weights",
        most=2**64 - 1,
    )
    precision: Literal["", "bf16", "fp32"] = option(
        "", "precision of the student; empty: bf16 if the ds_config enables it, else fp32"
    )
    kernels: Literal["fused", "reference"] = option(
        "fused",
        "ladder, loss and statistics by fused kernels (Triton on a GPU), or by reference code in"
        " plain torch, to debug",
        machinery=True,
    )
    teachers: tuple[Teacher, ...] = option(
        (),
        "comma-separated SOURCE, NAME=SOURCE or names of the recipe's teachers, which keep their"
        " settings; auto (train, check, plan): chosen from --among within --budget, by the"
        " comparison of `unic-ds teachers compare`",
    )
    stages: str = option(
        "",
        "earlier training stages, separated by ';', each as the options in which it differs, as in"
        " 'student.size=224 optim.epochs=200'; stage N trains in OUT/stageN and starts from the"
        " student of the stage before it",
    )
    cache: str = option(
        "",
        "feature cache, a folder made by `unic-ds cache`: the teachers stored in it are not run,"
        " and the run trains on its views",
        machinery=True,  # the path may move; a checkpoint has its hash
    )
    plugins: tuple[str, ...] = option(
        (),
        "Python modules to import first, comma-separated: they may register recipes, methods,"
        " teacher sources, loss terms, balancers and evaluators",
        machinery=True,
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
    probe: Probe = Probe()
    run: Run = Run()

    def __post_init__(self) -> None:
        valid = not self.recipe or RECIPE_NAME.fullmatch(self.recipe)
        check(bool(valid), "recipe", "a name of letters, digits, _, +, - and .", self.recipe)
        check_most(self, "")
        check(self.seed >= 0, "seed", ">= 0", self.seed)
        stages_of.parse(self.stages)
        teachers = len(self.teachers)
        check(teachers <= TEACHERS, "teachers", f"at most {TEACHERS}", teachers)
        solved = self.balance.kind != "mgda" or teachers <= MGDA_TEACHERS
        check(solved, "teachers", f"at most {MGDA_TEACHERS} if balance.kind is mgda", teachers)
        names = [t.name for t in self.teachers]
        distinct = len(set(names)) == len(names)
        check(distinct, "teachers' names", "different (write NAME=SOURCE)", ",".join(names))
        both = bool(self.data.val and self.data.val_share)
        check(not both, "data.val and data.val_share", "not both set", self.data.val)
        self.probe.check_best_by(self.run.best_by)
        if not self.plugins:  # else the registries are checked, once the plugins are loaded
            check_names(self)
            for task in self.probe.tasks:
                check(task in PROBES, "probe.tasks", f"of {', '.join(PROBES)}", task)
        if self.drop.lazy:
            kind = self.balance.kind
            want = f"false for balance.kind {kind}, which needs all losses"
            check(kind == "dropping", "drop.lazy", want, True)
            self.check_terms("drop.lazy", "false", True)
        for row in self.teachers if self.balance.kind == "mgda" else ():
            why = (
                "empty for balance.kind mgda, whose gradients are those at the student's last block"
            )
            check(not row.rungs, f"teachers.{row.name}.rungs", why, row.rungs)
        if shown := [row for row in self.teachers if row.domains]:
            at, kind = f"teachers.{shown[0].name}.data", self.balance.kind
            compared = kind in ("famo", "mgda")
            want = f"empty for balance.kind {kind}, which compares all teachers in each step"
            check(not compared, at, want, shown[0].data)
            per_image = self.drop.unit == "image" or self.balance.kind != "dropping"
            check(per_image, at, "empty for drop.unit step", shown[0].data)
            self.check_terms(at, "empty", shown[0].data)
        if "patch" in self.loss.kind_of_source.values():
            self.check_terms("loss.tokens", "without =patch", self.loss.tokens)
        if self.loss.shift:
            cached = "0 with teachers.cache, which has features of images that are not shifted"
            check(not self.cache, "loss.shift", cached, self.loss.shift)
            for row in self.teachers:
                want = (
                    f"0 with teachers.{row.name}.resize larger, whose patches are not the student's"
                )
                check(row.resize != "larger", "loss.shift", want, self.loss.shift)
        for row in self.teachers if self.data.sizes else ():
            where, placement = f"teachers.{row.name}.placement", row.placement
            given = f"with data.sizes (or give teachers.{row.name}.size)"
            check(row.own_side or placement == "replicate", where, f"replicate {given}", placement)
            where = f"teachers.{row.name}.precision"
            check(row.own_side or not row.quantised, where, f"bf16 or fp32 {given}", row.precision)
        for row in self.teachers:
            check(any(self.distance(row)), f"teachers.{row.name}'s losses", "not both none", "none")
            used = row.weight == 1 or self.balance.kind != "none"
            check(used, f"teachers.{row.name}.weight", "1 if balance.kind is none", row.weight)

    def check_terms(self, name: str, want: str, value: object) -> None:
        """Raise ValueError for an option with which a term lacks the targets of some images."""
        for row in self.teachers:
            for term in self.distance(row).cls:
                why = f"{want} for the term {term}, which needs the targets of all images"
                check(term not in loss_terms.OF_ALL_IMAGES, name, why, value)

    def distance(self, row: Teacher) -> Distance:
        """Loss terms of one teacher."""
        cls, patch = row.cls_loss or self.loss.cls, row.patch_loss or self.loss.patch
        return replace(self.loss, cls=cls, patch=patch).distance

    @property
    def kept_share(self) -> float:
        """Expected fraction of (teacher, image) pairs that have a coefficient above 0."""
        dropping = self.balance.kind == "dropping"
        return self.drop.kept_share(len(self.teachers)) if dropping else 1.0

    @property
    def chooses_pairs(self) -> bool:
        """True if a teacher may run on a part of the images of a step."""
        return self.drop.lazy or any(row.domains for row in self.teachers)

    @property
    def metrics_vary(self) -> bool:
        """True if a step may have no image for some of its metrics."""
        return self.chooses_pairs or bool(self.loss.kind_of_source)

    @property
    def computed_share(self) -> float:
        """Expected fraction of (teacher, image) pairs whose features are computed."""
        return self.drop.computed_share(len(self.teachers))

    @property
    def earlier_stages(self) -> tuple[Stage, ...]:
        """The stages that `--stages` gives, parsed."""
        return stages_of.parse(self.stages)

    @property
    def distances(self) -> dict[str, Distance]:
        """Loss terms of each teacher, by name."""
        return {row.name: self.distance(row) for row in self.teachers}
