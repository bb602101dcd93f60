"""Arguments of the custom op of `drop_coefficients`; its schema is derived from these fields."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Unit = Literal["image", "step"]
"""The teacher with the largest loss on an image is kept there, or that of the step everywhere."""
Divisor = Literal["expected", "kept"]
"""Coefficients are divided by the number of pairs kept on average, or by that of this batch."""


class Arguments(NamedTuple):
    """Arguments of the op, which has no gradient."""

    loss_TB: Tensor
    uniform_TB: Tensor
    weight_T: Tensor
    rate: float
    choices: list[bool]  # the next three

    @property
    def keep_hardest(self) -> bool:
        return self.choices[0]

    @property
    def per_step(self) -> bool:
        return self.choices[1]

    @property
    def count_kept(self) -> bool:
        return self.choices[2]


def expected_pairs(loss_TB: Tensor, rate: float, keep_hardest: bool) -> float:
    """Return the number of pairs that are kept on average."""
    teachers, images = loss_TB.shape
    certain = 1 if keep_hardest else 0
    return images * (certain + (teachers - certain) * (1 - rate))
