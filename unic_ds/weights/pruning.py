"""Structured pruning of an encoder: the least important attention heads and MLP channels go.

Each block keeps as many as any other, so the student remains a ViT of one shape.

The importance of a head, or of a channel, is a second-order estimate of what its removal changes.
With the Jacobian J of the features with respect to a gate g = 1 on it, their squared change is
about |J|^2. That is E[(v'J)^2] over random signs v (Hutchinson's estimator), so one backward pass
per batch of unlabelled images measures all gates. Gradients with respect to gates rank heads in
arXiv 1905.10650 and channels in arXiv 1906.10771, for the loss of a task.

The Linear behind the kept ones is solved anew by least squares, so that its outputs are as near to
the whole one's as they can be (as in ThiNet, arXiv 1707.06342).
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from unic_ds import config
from unic_ds.models.encoder import features
from unic_ds.models.narrow_vit import FIRST, narrow, plain_attention, plain_mlp
from unic_ds.tokens import Normalise

ALIGNED = 8
"""The MLP's width becomes a multiple of it, as matrix products in bf16 and int8 want."""
RIDGE = 1e-4
"""Ridge of the least squares, relative to the mean of the diagonal."""


@dataclass
class Part:
    """The attention or the MLP of a block: the Linears of its groups, and what is measured."""

    name: str
    """Its name in the encoder, as `blocks.0.attn`."""
    first: tuple[str, ...]
    """Linears whose outputs are grouped, once or several times one after the other."""
    last: str
    """The Linear whose inputs are grouped."""
    groups: int
    """Heads, or channels of the MLP."""
    channels: int
    """Inputs of `last`; each group has as many."""
    keep: int
    """Groups to keep."""
    x_BNC: Tensor | None = None
    """Inputs of `last` for the present batch."""

    def __post_init__(self) -> None:
        self.importance_G = torch.zeros(self.groups)
        self.gram_DD = torch.zeros(self.channels + 1, self.channels + 1)
        """Sum of x x' over tokens, of the inputs x of `last` with a 1 behind."""

    @property
    def at(self) -> str:
        """Name of `last` in the encoder."""
        return f"{self.name}.{self.last}"

    def hold(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep the inputs of `last`, and their gradient in the backward pass to come."""
        (self.x_BNC,) = inputs
        self.x_BNC.retain_grad()

    @torch.no_grad()
    def measure(self) -> None:
        """Add the importance of the present batch, whose backward pass is done."""
        x_BNC = self.x_BNC
        assert x_BNC is not None and x_BNC.grad is not None, "a backward pass comes before"
        slope_BG = (x_BNC * x_BNC.grad).sum(1).unflatten(1, (self.groups, -1)).sum(-1)
        self.importance_G += slope_BG.square().sum(0)
        x_MC = x_BNC.flatten(0, 1)
        x_MD = torch.cat([x_MC, torch.ones_like(x_MC[:, :1])], 1)
        self.gram_DD.addmm_(x_MD.T, x_MD)
        self.x_BNC = None

    def kept(self) -> Tensor:
        """Input channels of `last` that are kept, ascending."""
        chosen_G = self.importance_G.topk(self.keep).indices.sort().values
        width = self.channels // self.groups
        return (chosen_G[:, None] * width + torch.arange(width)).flatten()

    def pruned(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of its Linears for the kept groups, by their names in the encoder's `state`."""
        kept_K = self.kept()
        names = [
            f"{self.name}.{linear}.{key}" for linear in self.first for key in ("weight", "bias")
        ]
        found = {
            name: state[name].unflatten(0, (-1, self.channels))[:, kept_K].flatten(0, 1)
            for name in names
            if name in state
        }
        return found | self.solved(kept_K, state)

    def solved(self, kept_K: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of `last` on the kept channels that are nearest to it on all of them."""
        weight, bias = f"{self.at}.weight", f"{self.at}.bias"
        parts = [state[weight]]
        if bias in state:
            parts.append(state[bias][:, None])
            kept_K = torch.cat([kept_K, torch.tensor([self.channels])])
        whole_CD = torch.cat(parts, 1).double()
        gram_KD = self.gram_DD.double()[kept_K, : whole_CD.shape[1]]
        gram_KK = gram_KD[:, kept_K]
        gram_KK += RIDGE * gram_KK.diagonal().mean() * torch.eye(len(kept_K))
        found_CK = torch.linalg.solve(gram_KK, gram_KD @ whole_CD.T).T.float()
        if bias not in state:
            return {weight: found_CK}
        return {weight: found_CK[:, :-1], bias: found_CK[:, -1]}


def prune(
    encoder: VisionTransformer, cfg: config.Student, share: float, batches: Iterable[Tensor]
) -> tuple[VisionTransformer, config.Student]:
    """A copy of a frozen encoder without `share` of the heads and MLP channels of each block.

    `batches` are unlabelled images, uint8 B3HW at `cfg.size`. Returns the encoder and its settings.
    ValueError for a share that leaves all, or blocks that have no narrower form.
    """
    parts = parts_of(encoder, share)
    hooks = [encoder.get_submodule(part.at).register_forward_pre_hook(part.hold) for part in parts]
    try:
        for i, image_B3HW in enumerate(batches):
            differentiate(encoder, cfg, image_B3HW, seed=i)
            for part in parts:
                part.measure()
    finally:
        for hook in hooks:
            hook.remove()
    state = dict(encoder.state_dict())
    for part in parts:
        state |= part.pruned(state)
    found, (heads, mlp_width) = deepcopy(encoder), (part.keep for part in parts[:2])
    narrow(found, heads, mlp_width)
    found.load_state_dict(state)
    found.requires_grad_(False).eval()
    return found, replace(cfg, heads=heads, mlp_width=mlp_width)


def parts_of(encoder: VisionTransformer, share: float) -> list[Part]:
    """Attention and MLP of each block."""
    parts = []
    for i, block in enumerate(encoder.blocks):
        try:
            attn, mlp = plain_attention(block), plain_mlp(block)
        except ValueError as error:
            raise ValueError(f"--prune has no form of this student: {error}") from None
        heads, width = attn.num_heads, mlp.fc2.in_features
        some = max(1, round((1 - share) * heads))
        most = max(1, round((1 - share) * width / ALIGNED)) * ALIGNED
        parts += [
            Part(f"blocks.{i}.attn", ("qkv", "gate"), "proj", heads, attn.attn_dim, some),
            Part(f"blocks.{i}.mlp", FIRST, "fc2", width, width, min(most, width)),
        ]
    if all(part.keep >= part.groups for part in parts):
        raise ValueError(
            f"--prune {share:g} leaves all {parts[0].groups} heads and {parts[1].groups} MLP"
            " channels of a block; give a larger share"
        )
    return parts


def differentiate(
    encoder: VisionTransformer, cfg: config.Student, image_B3HW: Tensor, *, seed: int
) -> None:
    """Backward pass of v'f: f are CLS, and the patches with the weight of one token together."""
    x_B3HW = Normalise(cfg.mean, cfg.std)(image_B3HW, torch.float32).requires_grad_()
    generator, total = torch.Generator().manual_seed(seed), torch.zeros(())
    with torch.enable_grad():
        cls_BC, patch_BNC = features(encoder, x_B3HW)
        for y, weight in ((cls_BC, 1.0), (patch_BNC, patch_BNC.shape[1] ** -0.5)):
            signs = torch.randint(0, 2, y.shape, generator=generator) * 2 - 1
            total = total + weight * (y * signs).sum()
    total.backward()
