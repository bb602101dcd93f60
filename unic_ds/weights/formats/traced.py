"""The module that onnx and export trace: normalised images to tokens, at any size if it can be.

timm resamples position embeddings by an antialiased bicubic filter, in a branch that a graph with
dynamic sides cannot hold. Here the same filter is two matrices, made of the sides within the graph;
at the own size they are the identity.
"""

from __future__ import annotations

from copy import deepcopy
from types import MethodType
from typing import cast

import torch
from timm.layers import Format, PatchEmbed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from unic_ds.weights.formats.handover import Handover, Outputs, outputs_of

IMAGES = "pixel_values"
"""Name of the input: normalised images, fp32 [B, 3, height, width]."""
CUBIC = -0.5
"""Coefficient of the bicubic filter with antialias, of torch and Pillow."""
MOST_ROWS = 1024
"""Patches along a side that a graph is made for."""


class Traced(nn.Module):
    """Encoder, and predictions if they are kept, as one module whose outputs have names."""

    def __init__(self, handover: Handover):
        super().__init__()
        self.encoder = deepcopy(handover.encoder)
        self.predictions = deepcopy(handover.predictions)
        if takes_any_size(handover):
            give_dynamic_positions(self.encoder)
        self.eval()

    def forward(self, pixel_values: Tensor) -> Outputs:
        return outputs_of(self.encoder, self.predictions, pixel_values)


class TracedBf16(Traced):
    """`Traced` in bf16; images, outputs, and the standardisation that is undone, are in fp32."""

    def __init__(self, handover: Handover):
        super().__init__(handover)
        self.encoder.bfloat16()
        if self.predictions:
            self.predictions.ladder.bfloat16()

    def forward(self, pixel_values: Tensor) -> Outputs:
        found = super().forward(pixel_values.bfloat16())
        return {name: value.float() for name, value in found.items()}


def takes_any_size(handover: Handover) -> bool:
    """True if the encoder is timm's ViT with learned positions over plain patches."""
    encoder = handover.encoder
    learned = type(encoder) is VisionTransformer and encoder.pos_embed is not None
    return learned and type(encoder.patch_embed) is PatchEmbed


def give_dynamic_positions(encoder: VisionTransformer) -> None:
    """Let an encoder take images of any sides that are multiples of its patch."""
    embed = encoder.patch_embed
    vars(embed).update(strict_img_size=False, img_size=None, flatten=False, output_fmt=Format.NHWC)
    vars(encoder)["_pos_embed"] = MethodType(add_positions, encoder)


def add_positions(encoder: VisionTransformer, x_BHWD: Tensor) -> Tensor:
    """Tokens (B, N, D) of patches: with prefix tokens, and positions for the patches' grid."""
    batch, rows, columns, width = x_BHWD.shape
    old = encoder.patch_embed.grid_size
    count = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    pos_1ND = cast(Tensor, encoder.pos_embed)
    grid_HWD = in_dtype(pos_1ND[0, count:].unflatten(0, old), torch.float32)
    grid_HWD = torch.einsum("hy,yxd->hxd", resampling(rows, old[0]), grid_HWD)
    grid_HWD = torch.einsum("wx,hxd->hwd", resampling(columns, old[1]), grid_HWD)
    grid_HWD = in_dtype(grid_HWD, pos_1ND.dtype)
    pos_1ND = torch.cat([pos_1ND[:, :count], grid_HWD.reshape(1, -1, width)], 1)
    prefix = [t for t in (encoder.cls_token, encoder.reg_token) if t is not None]
    before = [token.expand(batch, -1, -1) for token in prefix]
    x_BND = x_BHWD.reshape(batch, -1, width)
    if encoder.no_embed_class:
        return torch.cat([*before, x_BND + pos_1ND], 1)
    return torch.cat([*before, x_BND], 1) + pos_1ND


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a type, without a node in the graph if it has that already."""
    return x if x.dtype == dtype else x.to(dtype)


def resampling(new: int, old: int) -> Tensor:
    """Weights (new, old) of the antialiased bicubic filter that resamples a side."""
    place_N1, place_1O = torch.arange(new)[:, None].float(), torch.arange(old)[None].float()
    step_11 = old / torch.ones(1, 1).mul(new)  # `new` may be a symbol
    distance_NO = (place_1O + 0.5 - (place_N1 + 0.5) * step_11) / step_11.clamp(min=1.0)
    weight_NO = cubic(distance_NO.abs())
    return weight_NO / weight_NO.sum(1, keepdim=True)


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic filter of distances."""
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def example(handover: Handover) -> Tensor:
    """Images to trace with: axes that are dynamic have different lengths above 1."""
    side = handover.cfg.size
    wider = side + handover.patch if takes_any_size(handover) else side
    return torch.zeros(2, 3, max(side, 2 * handover.patch), max(wider, 3 * handover.patch))


def dynamic_shapes(handover: Handover) -> dict[str, dict[int, object]]:
    """The input's dynamic axes: images, and sides in patches if they may differ."""
    axes: dict[int, object] = {0: Dim("batch", min=1, max=65536)}
    if takes_any_size(handover):
        axes[2] = handover.patch * Dim("rows", min=1, max=MOST_ROWS)
        axes[3] = handover.patch * Dim("columns", min=1, max=MOST_ROWS)
    return {IMAGES: axes}


def trace(module: nn.Module, handover: Handover) -> ExportedProgram:
    """The graph of a `Traced`, or of one with weights of eight bits."""
    with torch.no_grad():
        return torch.export.export(
            module, (example(handover),), dynamic_shapes=dynamic_shapes(handover)
        )


def preprocessing(handover: Handover) -> dict[str, object]:
    """Steps from images to the input, as a JSON object."""
    cfg = handover.cfg
    return {
        "input": IMAGES,
        "layout": "float32 [batch, 3, height, width], RGB, (image / 255 - mean) / std",
        "size": cfg.size,
        "any_size": takes_any_size(handover),
        "multiple_of": handover.patch,
        "interpolation": "bicubic",
        "mean": list(cfg.mean),
        "std": list(cfg.std),
    }
