"""The part of a timm model behind its tokens: a classifier, or a projection to a text space."""

from __future__ import annotations

from typing import cast

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from unic_ds.teachers.adapters import TimmMap, TimmViT, Tower
from unic_ds.tokens import Tokens

TOLERANCE = 1e-3
"""Relative error of a head on tokens beside its whole model, in fp32."""


class TimmHead(nn.Module):
    """A timm model's own head on its tokens, as the adapters give them.

    The sequence that `forward_head` pools is put together again. Tokens besides CLS and patches
    (registers, DeiT's distillation token) are not known; CLS stands in their places, and `agrees`
    tells if the head reads them.
    """

    def __init__(self, tower: TimmViT | TimmMap):
        super().__init__()
        self.model = cast(VisionTransformer, tower.model)
        self.pooled = tower.pools
        """True if the summary has gone through the model's attention pool."""
        self.is_map = isinstance(tower, TimmMap)
        self.channels_last = isinstance(tower, TimmMap) and tower.channels_last
        self.prefix = 0 if self.is_map else self.model.num_prefix_tokens
        token = getattr(self.model, "global_pool", "token") == "token"
        pools_patches = isinstance(tower, TimmViT) and tower.has_cls and not token
        self.kinds = frozenset({"patch"} if pools_patches and not self.pooled else {"cls"})
        """Kinds of token that it reads."""

    def forward(self, tokens: Tokens) -> Tensor:
        """Logits or embeddings (B, L)."""
        cls_BC = tokens.cls_BC
        if self.pooled and self.is_map:
            return self.model.forward_head(cls_BC)
        if self.pooled:
            return self.model.head(cls_BC)
        if self.is_map:
            map_BCHW = cls_BC[:, :, None, None]
            shown = map_BCHW.permute(0, 2, 3, 1) if self.channels_last else map_BCHW
            return self.model.forward_head(shown)
        body_BNC = tokens.patch_BNC if "patch" in self.kinds else cls_BC[:, None]
        first_BC = cls_BC if cls_BC.numel() else body_BNC.mean(1)
        prefix_BNC = first_BC[:, None].expand(-1, self.prefix, -1)
        return self.model.forward_head(torch.cat([prefix_BNC, body_BNC], 1))


def agrees(found_BL: Tensor, whole_BL: Tensor) -> bool:
    """True if a head on tokens gives what the whole model gives of the same images."""
    if found_BL.shape != whole_BL.shape:
        return False
    return bool((found_BL - whole_BL).norm() <= TOLERANCE * whole_BL.norm())


def noise(size: int, device: torch.device) -> Tensor:
    """Two seeded images (2, 3, size, size) of normalised noise, on which heads are compared."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator).to(device)


def drop_blocks(tower: Tower) -> None:
    """Free the weights of a tower's blocks, which a head does not read."""
    for block in tower.blocks():
        block.to("meta")
