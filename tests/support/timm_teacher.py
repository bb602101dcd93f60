"""A teacher of timm's blocks, without weights of its own: `python:timm_teacher:build`."""

from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from unic_ds.tokens import Tokens


class ViT(nn.Module):
    """timm's smallest ViT, with DINOv2's layer scales."""

    image_size, patch_size = 32, 16
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vit = timm.create_model("test_vit", img_size=32, num_classes=0, init_values=0.1)

    def forward(self, images):
        tokens_BNC = self.vit.forward_features(images)
        return Tokens(tokens_BNC[:, 0], tokens_BNC[:, 1:])


def build():
    return ViT()


def save_vits(root: Path, names: Iterable[str]) -> None:
    """Save timm's smallest ViT as `NAME.safetensors`, of other random weights for each name."""
    for seed, name in enumerate(names):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            state = timm.create_model("test_vit", num_classes=0).state_dict()
        save_file(state, root / f"{name}.safetensors")
