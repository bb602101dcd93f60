"""A teacher whose features of some pictures are faulty: give its folder as PYTHONPATH, and
its source as python:faulty_teacher:build.

Of a red picture its features are infinite, of a green one no numbers, of a blue one far too large,
of a white one so large that a steep loss is finite but its gradient's norm is not.
"""

import torch
from torch import Tensor, nn

from unic_ds.tokens import Tokens

COLOURS = {
    (255, 0, 0): float("inf"),
    (0, 255, 0): float("nan"),
    (0, 0, 255): 1e3,
    (255, 255, 255): 1e10,
}


class Faulty(nn.Module):
    """Patches' colours through a fixed matrix, by the picture's colour times something."""

    image_size, patch_size = 32, 16
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, 16)
        with torch.no_grad():
            for i, weight in enumerate(self.parameters()):
                weight.copy_(torch.linspace(-1, 1, weight.numel()).cos().view_as(weight) + i)

    def forward(self, images: Tensor) -> Tokens:
        """Features of images in [0, 1]."""
        patch_BNC = self.patches(images).flatten(2).transpose(1, 2)
        for colour, factor in COLOURS.items():
            wanted_311 = images.new_tensor(colour)[:, None, None] / 255
            is_it_B = (images - wanted_311).abs().amax((1, 2, 3)) < 0.02
            patch_BNC = patch_BNC * torch.where(is_it_B, factor, 1.0)[:, None, None]
        return Tokens(patch_BNC.mean(1), patch_BNC)


def build() -> Faulty:
    """The teacher."""
    return Faulty()
