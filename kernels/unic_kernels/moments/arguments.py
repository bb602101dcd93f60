"""Arguments of the custom op of `moments`; its schema is derived from these fields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """Arguments of the op, which has no gradient."""

    x: Tensor  # [M, C] or [B, N, C]
