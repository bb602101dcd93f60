"""Foreign models behind one face: normalised images in, `Tokens` of the model's own grid out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unic_ds.tokens import Tokens, from_map, split_prefix


class Tower(nn.Module):
    """What all towers say of themselves."""

    has_cls = False

    def blocks(self) -> list[nn.Module]:
        """The modules that repeat, in order: most of the weights, used one after another.

        What stands in a list and holds no such list itself; of CNNs those are small.
        """
        return list(repeated(self))


def repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost entries of a module's lists of blocks."""
    for name, part in module.named_children():
        listed = isinstance(part, (nn.Sequential, nn.ModuleList)) and name in LISTS
        for inner in part.children() if listed else (part,):
            below = list(repeated(inner))
            yield from below or ([inner] if listed else [])


LISTS = ("blocks", "resblocks", "stages", "layers")
"""What timm, open_clip and most others call the lists that hold a tower's blocks."""


class TimmViT(Tower):
    """A timm ViT: its output tokens, or those after `block` without the final norm.

    Unnormed, because the final norm is fitted to the last block and the targets are standardised
    anyway; on the demonstration's ViT the two differ by less than 0.01 in kNN, within the noise.
    """

    def __init__(self, model: Any, block: int):
        super().__init__()
        self.has_cls = model.num_prefix_tokens > 0 and getattr(model, "cls_token", None) is not None
        self.block = block
        if block >= 0:
            model.prune_intermediate_layers([block], prune_norm=True, prune_head=True)
        self.model = model

    def forward(self, image_B3HW: Tensor) -> Tokens:
        prefix = self.model.num_prefix_tokens
        if self.block < 0:
            return split_prefix(
                self.model.forward_features(image_B3HW), prefix, has_cls=self.has_cls
            )
        (after,) = self.model.forward_intermediates(
            image_B3HW,
            indices=[self.block],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        tokens_BNC = torch.cat([after[1], after[0]], 1) if prefix else after
        return split_prefix(tokens_BNC, prefix, has_cls=self.has_cls)


class TimmMap(Tower):
    """A timm model whose features are a map (CNNs, Swin): the last, or that of stage `block`."""

    def __init__(self, model: Any, block: int):
        super().__init__()
        self.block = block
        self.channels_last = getattr(model, "output_fmt", None) == "NHWC"
        self.model = model

    def forward(self, image_B3HW: Tensor) -> Tokens:
        if self.block >= 0:
            (map_BCHW,) = self.model.forward_intermediates(
                image_B3HW, indices=[self.block], output_fmt="NCHW", intermediates_only=True
            )
            return from_map(map_BCHW)
        features = self.model.forward_features(image_B3HW)
        if not isinstance(features, Tensor) or features.ndim != 4:
            shape = (
                tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            )
            raise ValueError(
                f"features of {type(self.model).__name__} are {shape}, neither ViT tokens nor a map"
            )
        return from_map(features.permute(0, 3, 1, 2) if self.channels_last else features)


class ClipViT(Tower):
    """open_clip's own ViT: tokens after `ln_post` and before the projection to the text space."""

    has_cls = True

    def __init__(self, visual: Any, block: int):
        super().__init__()
        if visual.attn_pool is not None:
            raise ValueError(
                "open_clip towers that pool by attention (CoCa) have no tokens after ln_post"
            )
        self.block = block
        # MultiheadAttention's own shortcut writes out its attention matrix on a CPU, and FLOP
        # counters do not know it; without, it is scaled_dot_product_attention.
        torch.backends.mha.set_fastpath_enabled(False)
        if block >= 0:
            visual.prune_intermediate_layers([block])
        visual.proj = None
        self.visual = visual

    def forward(self, image_B3HW: Tensor) -> Tokens:
        found = self.visual.forward_intermediates(
            image_B3HW,
            indices=[self.block] if self.block >= 0 else 1,
            normalize_intermediates=self.block < 0,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return Tokens(found["image_intermediates_prefix"][0][:, 0], found["image_intermediates"][0])


class ClipMap(Tower):
    """open_clip's ModifiedResNet: the last stage's map, before attention pooling."""

    def __init__(self, visual: Any):
        super().__init__()
        visual.attnpool = nn.Identity()
        self.visual = visual

    def forward(self, image_B3HW: Tensor) -> Tokens:
        found = self.visual.forward_intermediates(image_B3HW, indices=1, intermediates_only=True)
        return from_map(found["image_intermediates"][0])


class PythonTower(Tower):
    """A user's module: its (cls [B, C], patch [B, N, C]) as Tokens."""

    has_cls = True

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image_B3HW: Tensor) -> Tokens:
        found = self.model(image_B3HW)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise ValueError(f"forward must return Tokens(cls, patch), got {type(found).__name__}")
        return Tokens(*found)
