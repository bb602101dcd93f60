"""A teacher of timm's blocks, without weights of its own: `python:timm_teacher:build`."""

import timm
import torch
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
