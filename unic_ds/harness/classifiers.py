"""Classifiers of teachers: the heads of timm models, which read a student's predictions too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unic_ds.config import Teacher
from unic_ds.files.printable import printable
from unic_ds.harness import heads
from unic_ds.harness.heads import TimmHead
from unic_ds.process import console
from unic_ds.teachers.adapters import TimmMap, TimmViT
from unic_ds.teachers.probe import first_line
from unic_ds.teachers.sources import file, timm
from unic_ds.tokens import Tokens

WHOLE = {"timm": timm.whole, "file": file.whole}
"""Kinds of source whose models may have a classifier."""


@dataclass(frozen=True)
class HeadClassifier:
    """The classifier of a timm model (`features.Classifier`)."""

    head: TimmHead
    classes: int

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of token that it reads."""
        return self.head.kinds

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """Logits (B, L) of the teacher's tokens, in fp32."""
        return self.head(Tokens(tokens.cls_BC.float(), tokens.patch_BNC.float()))


def read_all(
    rows: Sequence[Teacher], *, grid: int, device: torch.device
) -> dict[str, HeadClassifier]:
    """Classifiers of the teachers that have one; of each other one, a line says why."""
    found = {}
    for row in rows:
        try:
            found[row.name] = read(row, grid=grid, device=device)
        except ValueError as error:
            console.say(f"no classifier: {error}")
    return found


def read(row: Teacher, *, grid: int, device: torch.device) -> HeadClassifier:
    """The classifier of a row's weights.

    ValueError if the row is not of timm, has no classifier, or one that cannot be computed from its
    CLS and patch tokens; also as `teachers.sources.read`.
    """
    if row.parsed_source.kind not in WHOLE:
        raise ValueError(
            f"teacher {row.name!r} has no classifier: only timm: and file: rows have, not"
            f" {printable(row.source)}"
        )
    if row.block != "output":
        raise ValueError(
            f"teacher {row.name!r} has no classifier of tokens after block {row.block}; its"
            " classifier reads those of --teachers.NAME.block output"
        )
    size, model = WHOLE[row.parsed_source.kind](row, grid)
    classes = getattr(model, "num_classes", 0)
    if not classes:
        raise ValueError(f"teacher {row.name!r} has no classifier among its weights")
    head = checked_head(row, model.to(device).eval().requires_grad_(False), size)
    return HeadClassifier(head, classes)


@torch.no_grad()
def checked_head(row: Teacher, model: nn.Module, size: int) -> TimmHead:
    """The head of a model, its blocks freed; ValueError unless its logits are the model's."""
    tower, _ = timm.tower_of(row, model)
    assert isinstance(tower, (TimmViT, TimmMap))
    device = next(model.parameters()).device
    image_B3HW = heads.noise(size, device)
    tokens, whole_BL = tower(image_B3HW), model(image_B3HW)
    head = TimmHead(tower).eval()
    heads.drop_blocks(tower)
    try:
        same, why = heads.agrees(head(tokens), whole_BL), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a head of timm that is given what it does not expect
        same, why = False, f" ({first_line(error)})"
    if not same:
        raise ValueError(
            f"teacher {row.name!r} has a classifier of {type(model).__name__} that reads more than"
            f" its CLS and patch tokens{why}; a prediction of these does not suffice for it"
        )
    return head
