"""Tiny students of random weights to hand over, with images that have structure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import open_clip
import torch
from open_clip import pretrained
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config
from unic_ds.harness.students import empty_statistics
from unic_ds.models.encoder import build_encoder
from unic_ds.models.ladder import Head
from unic_ds.models.ladder_description import Description
from unic_ds.models.model_folder import LADDER, STATISTICS
from unic_ds.models.student import ladder_on
from unic_ds.weights.export import export
from unic_ds.weights.formats.handover import Handover

MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)
HEADS = {"wide": Head(40), "narrow": Head(24, ("cls",), "3,5")}
"""Teachers of `student_folder`'s ladder; the second one's patches are not learned."""

LADDER_SETTINGS = config.Ladder(width=16)


def images(size: int) -> Tensor:
    """Eight smooth random images, uint8, the same at every size but for resampling."""
    draws = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (8, 3, 5, 5), generator=draws).float()
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def student(model: str = "test_vit", size: int = 32, registers: int = -1) -> Handover:
    """A student whose weights no initialisation would give."""
    cfg = config.Student(
        model=model, size=size, registers=registers, drop_path=0.0, mean=MEAN, std=STD
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build_encoder(cfg).eval().requires_grad_(False)
        for name, parameter in encoder.named_parameters():
            if not name.startswith("norm."):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    facts = {"dinov2": {"source": "timm:vit_small_patch14_dinov2", "licence": "Apache-2.0"}}
    return Handover(cfg=cfg, encoder=encoder, sample=images, teachers=facts)


@torch.no_grad()
def student_folder(
    out: Path,
    *,
    heads: Mapping[str, Head] = HEADS,
    teachers: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
    ladder: config.Ladder = LADDER_SETTINGS,
) -> Path:
    """A model folder of `student()` with a ladder and statistics, without a run."""
    found = student()
    module = ladder_on(found.encoder, ladder, heads)
    draws = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.2)
    description = Description(
        ladder=ladder, heads=heads, standardise=config.Standardise(), teachers=teachers
    )
    statistics = {}
    for name, norm in empty_statistics(description).items():
        norm.mean_2C.normal_(generator=draws)
        norm.std_2C.uniform_(0.5, 3, generator=draws)
        statistics |= {f"{name}.{key}": value for key, value in norm.state_dict().items()}
    return export(
        found.encoder.state_dict(),
        config.Config(student=found.cfg),
        images(found.cfg.size),
        out,
        extras={LADDER: module.export_state_dict(), STATISTICS: statistics},
        description=description,
    )


def place_clip(home: Path, name: str) -> int:
    """Place a small CLIP of random weights in open_clip's cache below a home; its image width."""
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    outline = {"embed_dim": 24, "text_cfg": text, "vision_cfg": vision}
    (home / f"{name}.json").write_text(json.dumps(outline))
    open_clip.add_model_config(home / f"{name}.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = open_clip.create_model(name)
    cache = home / ".cache" / "clip"
    cache.mkdir(parents=True)
    save_file(model.state_dict(), cache / f"{name}.safetensors")
    pretrained._PRETRAINED[name] = {"toy": {"url": f"https://none/{name}.safetensors"}}
    return 64
