"""Teachers that cost nothing to load: `python:small_teacher:narrow` and `wide`."""

import torch
from torch import nn

from unic_ds.tokens import Tokens


class Small(nn.Module):
    """Patches through one layer."""

    image_size, patch_size = 32, 16
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, width: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        draw = torch.Generator().manual_seed(width)
        for weight in self.parameters():
            weight.data.normal_(std=0.05, generator=draw)

    def forward(self, images):
        patch_BNC = self.patches(images).flatten(2).transpose(1, 2)
        return Tokens(patch_BNC.mean(1), patch_BNC)


class AnySide(Small):
    """The same on images of any side: those of the student's patch grid."""

    image_size = None


def changing():
    """The same with other weights at each call."""
    model = AnySide(24)
    torch.nn.init.normal_(model.patches.weight)
    return model


def following():
    return AnySide(24)


def narrow():
    return Small(24)


def wide():
    return Small(40)
