"""Patch tokens as colours: their first three principal components as red, green and blue."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

COMPONENTS = 3
OVERSAMPLED = 6
"""Components that the randomised PCA finds, of which the first three are used."""
ITERATIONS = 8
MOST_TOKENS = 16_384
"""Tokens to which a basis is fitted; of more, every second, third, ... is taken."""
RANGE = (0.01, 0.99)
"""Quantiles of a component's values that become the darkest and the brightest colour."""


class Basis(NamedTuple):
    """Three principal components of a model's patch tokens, and the range of the values on each.

    Two axes: D, the components (3), and C, the channels; all fp32 on the CPU.
    """

    mean_C: Tensor
    component_DC: Tensor
    low_D: Tensor
    high_D: Tensor
    share_D: Tensor
    """Share of the tokens' variance that each component has."""
    fitted_2: Tensor
    """Number of images and of tokens that it was fitted to."""

    def values(self, patch_BNC: Tensor) -> Tensor:
        """Values (B, N, 3) of patch tokens on the components."""
        return (patch_BNC.float().cpu() - self.mean_C) @ self.component_DC.T

    def colours(self, patch_BNC: Tensor) -> Tensor:
        """Colours (B, N, 3) of patch tokens in [0, 1]."""
        width_D = (self.high_D - self.low_D).clamp(min=torch.finfo(torch.float32).tiny)
        return ((self.values(patch_BNC) - self.low_D) / width_D).clamp(0, 1)

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """Its tensors by name, for a file."""
        return {f"{prefix}{name}": value for name, value in self._asdict().items()}

    @classmethod
    def read(cls, state: Mapping[str, Tensor], prefix: str, *, width: int) -> Basis | None:
        """The basis of a file's tensors; None if there is none for tokens of `width` channels."""
        found = {name: state.get(f"{prefix}{name}") for name in cls._fields}
        shapes = [(width,), (COMPONENTS, width), *[(COMPONENTS,)] * 3, (2,)]
        for value, shape in zip(found.values(), shapes, strict=True):
            if value is None or tuple(value.shape) != shape or not value.isfinite().all():
                return None
        return cls(**{name: value.float() for name, value in found.items() if value is not None})


def fit(patch_BNC: Tensor) -> Basis:
    """Fit a basis to the patch tokens of some images; the same tokens give the same basis.

    Tokens are centred by their mean, and not scaled. The largest weight of each component is
    positive. A component that tokens of fewer dimensions lack is 0. Random states stay as they are.
    """
    every = -(-patch_BNC[..., 0].numel() // MOST_TOKENS)
    token_MC = patch_BNC.detach().flatten(0, 1)[::every].cpu().double()
    mean_C = token_MC.mean(0)
    centred_MC = token_MC - mean_C
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs, too
        count = min(OVERSAMPLED, *centred_MC.shape)
        _, size_K, direction_CK = torch.pca_lowrank(
            centred_MC, q=count, center=False, niter=ITERATIONS
        )
    component_DC = direction_CK.T[:COMPONENTS]
    largest_D1 = component_DC.abs().argmax(1, keepdim=True)
    component_DC = component_DC * component_DC.gather(1, largest_D1).sign()
    missing = COMPONENTS - len(component_DC)
    component_DC = F.pad(component_DC, (0, 0, 0, missing))
    share_D = F.pad(size_K[:COMPONENTS].square(), (0, missing)) / centred_MC.square().sum().clamp(
        min=torch.finfo(torch.float64).tiny
    )
    value_MD = centred_MC @ component_DC.T
    low_D, high_D = torch.quantile(value_MD, value_MD.new_tensor(RANGE), dim=0)
    fitted_2 = torch.tensor([len(patch_BNC), len(token_MC)])
    found = (mean_C, component_DC, low_D, high_D, share_D, fitted_2)
    return Basis(*(value.float() for value in found))


def aligned(basis: Basis, earlier: Basis, patch_BNC: Tensor) -> Basis:
    """The basis with its components in the order, and with the signs, of an earlier one's colours.

    Those agree best whose values on the same tokens correlate most.
    """
    new_MD, old_MD = (one.values(patch_BNC).flatten(0, 1) for one in (basis, earlier))
    matches_DD = F.normalize(new_MD - new_MD.mean(0), dim=0).T @ F.normalize(
        old_MD - old_MD.mean(0), dim=0
    )
    columns = range(COMPONENTS)
    order = max(
        permutations(columns), key=lambda p: sum(float(matches_DD[p[d], d].abs()) for d in columns)
    )
    sign_D = torch.tensor([-1.0 if matches_DD[order[d], d] < 0 else 1.0 for d in columns])
    low_D, high_D = basis.low_D[list(order)] * sign_D, basis.high_D[list(order)] * sign_D
    return basis._replace(
        component_DC=basis.component_DC[list(order)] * sign_D[:, None],
        low_D=torch.minimum(low_D, high_D),
        high_D=torch.maximum(low_D, high_D),
        share_D=basis.share_D[list(order)],
    )


def to_map(colour_BND: Tensor) -> Tensor:
    """Colours (B, N, 3) of a square grid of tokens as uint8 maps (B, G, G, 3)."""
    side = round(colour_BND.shape[1] ** 0.5)
    if side * side != colour_BND.shape[1]:
        raise ValueError(f"{colour_BND.shape[1]} patch tokens do not form a square grid")
    return (colour_BND * 255).round().to(torch.uint8).unflatten(1, (side, side))
