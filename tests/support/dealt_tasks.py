"""Scores of the tasks on class labels whose images are dealt to the ranks: `dealt_tasks.py OUT`.

OUT gets, as JSON, the `Found` of each rank in rank order.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from memory_sets import MemoryImages, columns_model, scores_of
from pictures import folder
from planted_classes import planted
from torch import nn

from unic_ds import config, dist
from unic_ds.evaluate.features import Model, Outputs
from unic_ds.evaluate.utility import pruned_copy
from unic_ds.harness import layouts
from unic_ds.harness.models import teacher_model
from unic_ds.teachers.teacher import load

TASKS = ("transfer", "robustness", "retrieval", "rankme", "utility")


def sets_of_task(task: str) -> dict[str, MemoryImages]:
    """The sets of a task: shares of unequal length, images without a label, a test of one image."""
    rows = planted(151, 86, 24, 5, gap=4)
    rows.train_label_N[7] = rows.val_label_N[-1] = -1
    rows.val_label_N[3] = 8  # a class that is not among the training images
    classes = tuple("abcdefghi")
    train = MemoryImages(*rows[:2], classes)
    val = MemoryImages(*rows[2:], classes)
    true = int(rows.val_label_N[0])
    one = MemoryImages(rows.val_NC[:1], torch.tensor([1]), (classes[true - 1], classes[true]))
    if task == "transfer":
        return {"x/train": train, "x/val": val, "g/y/train": train, "g/y/val": one}
    return {"train": train, "val": val} | ({"one": one} if task == "robustness" else {})


def linear_model(layer: nn.Linear) -> Model:
    """A model of one layer, which can be pruned."""

    def outputs(row_BC: torch.Tensor, _: object) -> Outputs:
        with torch.no_grad():
            return Outputs(layer(row_BC))

    def pruned(share: float) -> Model:
        return linear_model(pruned_copy(layer, share))

    return replace(columns_model("layer"), encode=outputs, pruned=pruned)


def scores_of_all() -> list[tuple[str, str, float, str]]:
    """Scores of all tasks."""
    layer = nn.Linear(24, 12)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(12, 24, generator=torch.Generator().manual_seed(0)))
        layer.bias.zero_()
    models = [columns_model("narrow", slice(8)), linear_model(layer)]
    found = [score for task in TASKS for score in scores_of(task, models, sets_of_task(task))]
    one = sets_of_task("robustness")["one"]  # one rank has no query
    sets = sets_of_task("retrieval") | {"val": replace(one, label_N=one.label_N + 1)}
    found += [
        score._replace(name=f"one {score.name}") for score in scores_of("retrieval", models, sets)
    ]
    return [score[:4] for score in found]


def pruned_placements() -> list[str]:
    """Placements of a teacher in which it can be pruned."""
    row = config.Teacher(name="narrow", source="python:small_teacher:narrow")
    found = []
    for placement in ("replicate", "shard", "offload"):
        teacher = load(replace(row, placement=placement), grid=2, device=dist.device())
        if pruned := teacher_model(teacher).pruned:
            assert pruned(0.5).name == "narrow"
            found.append(placement)
    return found


class Found(NamedTuple):
    """All that a rank finds."""

    scores: list[tuple[str, str, float, str]]
    pruned: list[str]
    """Placements of a teacher in which it can be pruned."""
    refusals: list[str]
    """Sentences about folders of which each rank has another."""


def refusals(root: Path) -> list[str]:
    """Sentences about data whose images are different on each rank."""
    own, found = root / f"rank_{dist.rank()}", []
    for name in ("train", "test"):
        folder(own / name, 4 + dist.rank())
    os.chdir(own)
    for task in ("rankme", "robustness"):
        try:
            layouts.open_sets(task, Path(), config.Config())
        except RuntimeError as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    dist.start()
    out = Path(sys.argv[1])
    every = dist.all_gather_objects(
        Found(scores_of_all(), pruned_placements(), refusals(out.parent))
    )
    if dist.rank() == 0:
        out.write_text(json.dumps(every))
