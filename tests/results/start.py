"""A start for a student: a ViT's features after an inner block, standardised.

python tests/results/start.py WEIGHTS ARCH BLOCK SIZE LIST OUT

Writes OUT, a file for `student.init`, unless it is there: the safetensors file WEIGHTS of timm's
ARCH, a ViT with LayerScale, but with a LayerScale of zero in the blocks behind BLOCK, so that they
pass on what they get, and with a final norm that standardises each channel of the CLS token, by its
mean and deviation over `IMAGES` images of LIST at SIZE pixels. A student begins with the targets
that a run with standardisation has from this teacher.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

IMAGES, BATCH = 1500, 50
STD_FLOOR = 0.1
"""Smallest deviation of a channel, as a part of the median; as `standardise.std_floor`."""


def with_identities(weights: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    """The weights with a LayerScale of zero behind a block, and a norm without an affine map."""
    found = dict(weights)
    for name, value in weights.items():
        part, _, parameter = name.removeprefix("blocks.").partition(".")
        if name.startswith("blocks.") and int(part) > block and parameter.startswith("ls"):
            found[name] = torch.zeros_like(value)
    found["norm.weight"] = torch.ones_like(weights["norm.weight"])
    found["norm.bias"] = torch.zeros_like(weights["norm.bias"])
    return found


def loaded(weights: Path, arch: str, size: int) -> VisionTransformer:
    """A ViT for images of `size` px; positions are resampled."""
    model = timm.create_model(arch, img_size=size, num_classes=0).eval()
    assert isinstance(model, VisionTransformer)
    load_checkpoint(model, str(weights), filter_fn=checkpoint_filter_fn)
    return model


@torch.no_grad()
def cls_tokens(model: VisionTransformer, size: int, paths: list[str]) -> Tensor:
    """Normed CLS tokens (N, C) of images of `size` px, in timm's preprocessing of the model."""
    wanted = timm.data.resolve_data_config({"img_size": size, "crop_pct": 1.0}, model=model)
    transform = timm.data.create_transform(**wanted)
    parts = []
    for at in range(0, len(paths), BATCH):
        images = [transform(Image.open(path).convert("RGB")) for path in paths[at : at + BATCH]]
        parts.append(model.forward_features(torch.stack(images))[:, 0])
    return torch.cat(parts)


def main(source: Path, arch: str, block: int, size: int, images: Path, out: Path) -> None:
    """Write the start."""
    if out.is_file():
        return
    start = with_identities(load_file(source), block)
    paths = sorted(images.read_text().splitlines())
    random.Random(0).shuffle(paths)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        file = Path(scratch) / out.name
        save_file(start, file)
        cls_NC = cls_tokens(loaded(file, arch, size), size, paths[:IMAGES])
        std_C, mean_C = torch.std_mean(cls_NC, 0)
        std_C = std_C.clamp(min=STD_FLOOR * std_C.median())
        start |= {"norm.weight": 1 / std_C, "norm.bias": -mean_C / std_C}
        save_file(start, file)
        file.rename(out)
    print(f"start: block {block} of {source.name}, standardised over {len(cls_NC)} images")


if __name__ == "__main__":
    first, name, at, side, listed, written = sys.argv[1:]
    main(Path(first), name, int(at), int(side), Path(listed), Path(written))
