"""Models whose features of an image are its summary token and the means of its map's quarters.

They stand side by side in one row, so features with patch tokens are extracted, cached and dealt to
ranks as CLS features are.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds.evaluate.features import Model, ModelOutput, Outputs
from unic_ds.evaluate.squares import to_maps
from unic_ds.tokens import KINDS

NEEDS: frozenset[ModelOutput] = frozenset({"cls", "patch"})
SIDE = 2
"""Cells of a map along each side; on an odd grid the middle patches belong to both."""


class Quarters(NamedTuple):
    """Features of N images: M = 1 summary token and M = 4 means of patch tokens, row by row."""

    cls_NMC: Tensor
    patch_NMC: Tensor

    @classmethod
    def of_rows(cls, row_NC: Tensor) -> Quarters:
        """The features of a `summarised` model."""
        token_NMC = row_NC.unflatten(1, (1 + SIDE * SIDE, -1))
        return cls(token_NMC[:, :1], token_NMC[:, 1:])

    def by_kind(self) -> dict[str, Tensor]:
        """The features by the kind of token."""
        return dict(zip(KINDS, self, strict=True))


def summarised(model: Model) -> Model:
    """The model with rows of `Quarters` in the place of its CLS features.

    It raises ValueError for patch tokens that do not form a square grid.
    """

    def encode(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        return Outputs(rows_of(model.encode(image_B3HW, NEEDS)))

    identity = f"{model.identity} summary and {SIDE} x {SIDE} quarters" if model.identity else ""
    return replace(
        model,
        outputs=frozenset({"cls"}),
        encode=encode,
        identity=hashlib.sha256(identity.encode()).hexdigest() if identity else "",
        at=None,
        pruned=None,
    )


def rows_of(found: Outputs) -> Tensor:
    """fp32 rows (B, 5 C) of a batch: the summary token, then the quarters from the top left."""
    assert found.cls_BC is not None and found.patch_BNC is not None
    map_BCHW = F.adaptive_avg_pool2d(to_maps(found.patch_BNC), SIDE)
    quarter_BMC = map_BCHW.flatten(2).transpose(1, 2)
    return torch.cat([found.cls_BC.float(), quarter_BMC.flatten(1)], 1)
