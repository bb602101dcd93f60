"""Teacher dropping in plain torch."""

from __future__ import annotations

from torch import Tensor

from unic_kernels.drop_coefficients.arguments import Divisor, Unit, expected_pairs


def drop_coefficients_ref(
    loss_TB: Tensor,
    uniform_TB: Tensor,
    weight_T: Tensor,
    *,
    rate: float,
    keep_hardest: bool = True,
    unit: Unit = "image",
    divisor: Divisor = "expected",
) -> Tensor:
    """Compute what `drop_coefficients` does."""
    keep_TB = uniform_TB >= rate
    if keep_hardest:
        judged_TB = loss_TB if unit == "image" else loss_TB.mean(1, True).expand_as(loss_TB)
        keep_TB = keep_TB.scatter(0, judged_TB.argmax(0, keepdim=True), True)
    kept_TB = keep_TB.to(loss_TB.dtype)
    if divisor == "kept":
        return weight_T[:, None] * kept_TB / kept_TB.sum().clamp(min=1)
    return weight_T[:, None] * kept_TB / expected_pairs(loss_TB, rate, keep_hardest)
