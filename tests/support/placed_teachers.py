"""Teachers spread over two ranks beside whole ones, then runs with such: `placed_teachers.py PLAN`.

PLAN is JSON: the rows of teachers, each as its fields, and command lines of unic_ds/train.py.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from unic_ds import config, dist, train
from unic_ds.teachers import teacher_set

GRID = 4


class Patches(torch.nn.Module):
    """A user's teacher, as python:placed_teachers:make."""

    image_size, mean, std = 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 16, 8, 8)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, image):
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens).relu()
        return tokens.mean(1), tokens


def make():
    torch.manual_seed(0)
    return Patches()


def tokens_of(row: config.Teacher) -> tuple[teacher_set.TeacherSet, list[torch.Tensor]]:
    """A teacher and what it says of this rank's images, the second time."""
    made = teacher_set.TeacherSet(
        (row,), grid=GRID, standardise=config.Standardise(), device=dist.device()
    )
    (side,) = made.sizes
    noise = torch.Generator().manual_seed(dist.rank())
    image = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=noise)
    made.features({side: image})
    return made, list(made.features({side: image})[row.name])


def local_bytes(made: teacher_set.TeacherSet) -> int:
    """Bytes of the weights that this rank holds."""
    (teacher,) = made.teachers.values()
    own = (getattr(p, "_local_tensor", p) for p in teacher.tower.parameters())
    return sum(x.untyped_storage().nbytes() for x in own)


def compare(row: config.Teacher) -> dict[str, object]:
    """Largest differences between a teacher in each placement and a replicated one."""
    whole, exact = tokens_of(row)
    found: dict[str, object] = {"bytes": local_bytes(whole)}
    facts = whole.manifest()
    for placement in ("shard", "offload"):
        spread, said = tokens_of(replace(row, placement=placement))
        found[placement] = {
            "same": all(torch.equal(x, y) for x, y in zip(said, exact, strict=True)),
            "same facts": spread.manifest() == facts,
            "bytes": local_bytes(spread),
            "trained": any(
                parameter.requires_grad
                for teacher in spread.teachers.values()
                for parameter in teacher.parameters()
            ),
        }
    return found


if __name__ == "__main__":
    plan = Path(next(word for word in sys.argv[1:] if not word.startswith("--")))
    rows, runs = json.loads(plan.read_text())
    dist.start()
    found = {row["name"]: compare(config.Teacher(**row)) for row in rows}
    plan.with_suffix(f".{dist.rank()}").write_text(json.dumps(found))
    for arguments in runs:
        if code := train.main(arguments):
            sys.exit(code)
