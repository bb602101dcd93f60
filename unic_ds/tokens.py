"""Token batches of teachers and student, and the dimension key of every tensor name.

B images per rank     N patch tokens      D student width    H, W image or map sides
C teacher width       T teachers          L ladder rungs     K drop-path branches
3 colour channels     2 cls, patch        S statistics (count, mean, M2)
A suffix spells a tensor's axes in order; flattened axes are one group (`x_BN_C`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("cls", "patch")


class Tokens(NamedTuple):
    """One model's tokens of an image batch: a global token and a grid of patch tokens.

    A ladder with a loss per rung puts an axis L in front of both.
    """

    cls_BC: Tensor
    patch_BNC: Tensor

    def copies(self) -> Tokens:
        """Views of the tokens, which autograd tells from these."""
        return Tokens(*(x.view_as(x) for x in self))


class Shared(NamedTuple):
    """Tokens of the student's last block, and the predictions made of them, in one graph."""

    features: tuple[Tensor, ...]
    pred: dict[str, Tokens]


class Target(NamedTuple):
    """A teacher's features of an image batch and the map from features to targets.

    target = clip((features - mean) / divisor, -clamp, clamp) per kind and channel; clamp 0 is off.
    Features of images that were not computed are 1.
    """

    features: Tokens
    mean_2C: Tensor
    divisor_2C: Tensor
    clamp: float
    computed_B: Tensor | None = None  # True for images whose features are computed; None: all

    @classmethod
    def of(cls, tokens: Tokens, clamp: float = 0.0) -> Target:
        """Target of tokens that are standardised already; the clamp alone applies."""
        mean_2C = torch.zeros(2, tokens.cls_BC.shape[-1], device=tokens.cls_BC.device)
        return cls(tokens, mean_2C, torch.ones_like(mean_2C), clamp)

    def standardised(self) -> Tokens:
        """fp32 targets of both kinds of token."""
        return Tokens(self.kind(0), self.kind(1))

    def kind(self, kind: int) -> Tensor:
        """fp32 targets of one kind of token (0: cls, 1: patch)."""
        y_C = (self.features[kind].float() - self.mean_2C[kind]) / self.divisor_2C[kind]
        return y_C.clamp(-self.clamp, self.clamp) if self.clamp > 0 else y_C


def split_prefix(tokens_BNC: Tensor, prefix: int, *, has_cls: bool) -> Tokens:
    """Tokens of a ViT's sequence with `prefix` leading tokens (CLS first, then registers).

    Without a CLS token the mean of the patches takes its place (method: section 1).
    """
    patch_BNC = tokens_BNC[:, prefix:]
    return Tokens(tokens_BNC[:, 0] if has_cls else patch_BNC.mean(1), patch_BNC)


def from_map(map_BCHW: Tensor) -> Tokens:
    """Tokens of a CNN's feature map: CLS is the mean over the map."""
    patch_BNC = map_BCHW.flatten(2).transpose(1, 2)
    return Tokens(patch_BNC.mean(1), patch_BNC)


def to_grid(tokens: Tokens, grid: int) -> Tokens:
    """Tokens with the patch map resized (bicubic, antialias) to `grid`.

    ValueError unless the map is square.
    """
    patch_BNC = tokens.patch_BNC
    side = round(patch_BNC.shape[1] ** 0.5)
    if side * side != patch_BNC.shape[1]:
        raise ValueError(f"{patch_BNC.shape[1]} patch tokens do not form a square grid")
    if side == grid:
        return tokens
    if not len(patch_BNC):  # which torch does not resize
        return Tokens(tokens.cls_BC, patch_BNC.new_empty(0, grid**2, patch_BNC.shape[-1]))
    map_BCHW = patch_BNC.transpose(1, 2).unflatten(2, (side, side)).float()
    map_BCHW = F.interpolate(
        map_BCHW, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False
    )
    return Tokens(tokens.cls_BC, map_BCHW.flatten(2).transpose(1, 2).to(patch_BNC.dtype))


def part_of_map(patch_BNC: Tensor, part: tuple[slice, slice]) -> Tensor:
    """The patch tokens [..., N, C] in some rows and columns of a square map."""
    side = round(patch_BNC.shape[-2] ** 0.5)
    rows, columns = part
    return patch_BNC.unflatten(-2, (side, side))[..., rows, columns, :].flatten(-3, -2)


def enlarged(patch_BNC: Tensor, grid: int) -> Tensor:
    """Patch tokens [..., N, C] with their map resized to a larger `grid`, as `to_grid` does.

    By two products, rows and columns: on a GPU torch's backward of bicubic resizing adds in no
    fixed order.
    """
    side = round(patch_BNC.shape[-2] ** 0.5)
    rows_SS = torch.eye(side, device=patch_BNC.device)[None, None]
    weight_GS = F.interpolate(rows_SS, size=(grid, side), mode="bicubic", antialias=True)[0, 0]
    map_BHWC = patch_BNC.unflatten(-2, (side, side)).float()
    map_BHWC = torch.einsum("gh,...hwc->...gwc", weight_GS, map_BHWC)
    map_BHWC = torch.einsum("gw,...hwc->...hgc", weight_GS, map_BHWC)
    return map_BHWC.flatten(-3, -2).to(patch_BNC.dtype)


class Normalise(nn.Module):
    """uint8 images -> (x / 255 - mean) / std, computed in fp32 and returned in `dtype`."""

    mean_311: Tensor
    std_311: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean_311", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std_311", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, image_B3HW: Tensor, dtype: torch.dtype) -> Tensor:
        return ((image_B3HW.float() - self.mean_311.float()) / self.std_311.float()).to(dtype)
