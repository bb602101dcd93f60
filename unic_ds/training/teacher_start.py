"""A student's initial weights from a teacher of its architecture (`unic-ds teachers start`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from timm.models import VisionTransformer
from torch import Tensor

from unic_ds import config, dist
from unic_ds.evaluate.extraction import extract
from unic_ds.files import tensor_files
from unic_ds.files.printable import printable
from unic_ds.harness.students import StudentParts, model_of
from unic_ds.models.encoder import grid_of
from unic_ds.models.model_folder import encoder_of
from unic_ds.process import console
from unic_ds.teachers import sources
from unic_ds.teachers.adapters import TOKEN, TimmViT
from unic_ds.teachers.sources.build import block_of
from unic_ds.training.teacher_comparison import gathered, sample

BRANCH_ENDS = ("ls1.", "ls2."), ("attn.proj.", "mlp.fc2.")
"""Last layers of a block's two branches, with LayerScale or without."""


def write(cfg: config.Config, row: config.Teacher, *, images: int, out: Path) -> None:
    """Write the encoder weights of a student whose CLS token is the teacher's, standardised.

    Blocks behind the teacher's `block` pass on what they get, and the final norm standardises each
    channel over at most `images` training images. Every rank calls it, rank 0 writes. ValueError,
    one sentence, unless the student of `cfg` has the teacher's architecture.
    """
    dist.start()
    chosen = sample(cfg, images)
    encoder = initial_encoder(cfg.student, row)
    parts = StudentParts(cfg=cfg.student, encoder=encoder.to(dist.device()))
    _, features = gathered(extract([model_of("start", parts)], chosen))

    def save() -> None:
        cls_NC = features["start"]
        standardise_norm(encoder, cls_NC, floor=cfg.standardise.std_floor)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            part = Path(scratch) / out.name
            tensor_files.save(encoder.state_dict(), part, {"format": "pt"})
            part.replace(out)
        console.say(f"standardised over {len(cls_NC)} images")

    dist.on_rank_0(save)


def initial_encoder(student: config.Student, row: config.Teacher) -> VisionTransformer:
    """The student with the teacher's weights, the identity in the place of blocks behind `block`.

    ValueError unless they fit.
    """
    teacher, arch = f"teacher {row.name!r}", row.parsed_source.arch
    try:
        whole = replace(row, block="output", precision="fp32", size=student.size)
        tower = sources.read(whole, grid_of(student)).tower
        if not isinstance(tower, TimmViT) or tower.summary != TOKEN:
            raise ValueError(f"{arch} is no ViT of timm with a CLS token")
        norm = tower.model.norm
        if not isinstance(norm, torch.nn.LayerNorm) or norm.bias is None:
            kind = printable(type(norm).__name__)
            raise ValueError(f"its final norm is {kind}; choose a ViT with a LayerNorm")
        state, block = tower.model.state_dict(), block_of(row, len(tower.model.blocks))
        return encoder_of(student, state if block < 0 else cut(state, block), arch)
    except ValueError as error:
        raise ValueError(f"no {student.model} can start from {teacher}: {error}") from None


def cut(state: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    """The weights of a ViT whose blocks behind `block` add nothing, and a norm without affine."""
    found = dict(state)
    behind = [name for name in state if block_number(name) > block]
    scale, last = ([x for x in behind if x.split(".", 2)[2].startswith(e)] for e in BRANCH_ENDS)
    for name in scale or last:
        found[name] = torch.zeros_like(state[name])
    found["norm.weight"] = torch.ones_like(state["norm.weight"])
    found["norm.bias"] = torch.zeros_like(state["norm.bias"])
    return found


def block_number(name: str) -> int:
    """The block that a weight of a timm ViT belongs to; -1 if to none."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else -1


@torch.no_grad()
def standardise_norm(encoder: VisionTransformer, cls_NC: Tensor, *, floor: float) -> None:
    """Have the final norm, a LayerNorm, standardise the channels of its CLS tokens `cls_NC`.

    `floor`: smallest deviation, as a part of the median channel's.
    """
    norm = encoder.norm
    assert isinstance(norm, torch.nn.LayerNorm)
    std_C, mean_C = torch.std_mean(cls_NC.double().to(norm.weight.device), 0)
    std_C = std_C.clamp(min=max(floor * float(std_C.median()), torch.finfo(torch.float32).tiny))
    norm.weight.copy_(norm.weight / std_C)
    norm.bias.copy_((norm.bias - mean_C) / std_C)
