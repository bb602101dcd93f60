"""Image tower of an exported student, which timm knows as `unic_ds_student` after this import.

The CLS tokens after several blocks pass a Linear and GELU each, and then together a Linear to the
space of texts. It needs torch and timm alone; `student_tower.json` beside it has the sizes.
"""

import json
from pathlib import Path
from typing import cast

import timm
import torch
from timm.models import VisionTransformer, register_model
from torch import Tensor, nn
from torch.nn import functional as F

States = Tensor | tuple[Tensor, Tensor]


class StudentTower(nn.Module):
    """Normalised images [B, 3, H, W] -> embeddings [B, E], not of unit length."""

    def __init__(self) -> None:
        super().__init__()
        facts = json.loads(Path(__file__).with_suffix(".json").read_text())
        encoder = timm.create_model(facts["model"], **facts["arguments"])
        self.encoder = cast(VisionTransformer, encoder)
        hidden = facts["hidden"]  # block -> width
        rungs = {block: nn.Linear(facts["width"], count) for block, count in hidden.items()}
        self.rungs = nn.ModuleDict(rungs)
        self.proj = nn.Linear(sum(hidden.values()), facts["embed_dim"])

    def forward(self, x: Tensor) -> Tensor:
        states = self.encoder.forward_intermediates(
            x,
            indices=[int(block) for block in self.rungs],
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        summary = [cls_of(self.encoder, state) for state in cast(list[States], states)]
        hidden = [rung(s) for rung, s in zip(self.rungs.values(), summary, strict=True)]
        return self.proj(F.gelu(torch.cat(hidden, -1)))


def cls_of(encoder: nn.Module, state: States) -> Tensor:
    """CLS after a block, or the mean of the patches if the encoder has none."""
    patches, prefix = state if isinstance(state, tuple) else (state, None)
    if prefix is None or getattr(encoder, "cls_token", None) is None:
        return patches.mean(1)
    return prefix[:, 0]


@register_model
def unic_ds_student(pretrained: bool = False, **_: object) -> StudentTower:
    """Build the tower; open_clip loads its weights."""
    return StudentTower()
