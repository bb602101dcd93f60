"""The distillation loss: `image_losses`, balanced; and teacher dropping in one launch.

With B images, T teachers, their weights w, losses (T, B) and uniforms (T, B), of chance p:

    keep_tb = uniform_tb >= p, or t has the largest loss on image b (unit `image`),
              or on the mean over images (unit `step`)
    coefficient_tb = w_t keep_tb / divisor
    divisor = B (1 + (T - 1)(1 - p))  the number of kept pairs to expect (`expected`);
              B T (1 - p) where the hardest may go as well
            = the number of kept pairs, at least 1 (`kept`)

Sariyildiz et al., UNIC, arXiv 2408.05088, section 3.3. The first teacher wins a tie, and a loss
that is not a number is the largest, as in torch. Coefficients have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unic_kernels.device import Build, beside
from unic_kernels.image_losses.op import Distance, Pair, image_losses, image_losses_ref

Balance = Callable[[Tensor, Tensor], Tensor]
"""Losses and uniforms (T, B) -> coefficients (T, B)."""
Refine = Callable[[Tensor], Tensor]
"""Losses of all entries -> losses per teacher."""


# The torch reference


def drop_coefficients_ref(
    loss_TB: Tensor,
    uniform_TB: Tensor,
    weight_T: Tensor,
    *,
    rate: float,
    keep_hardest: bool = True,
    unit: Literal["image", "step"] = "image",
    divisor: Literal["expected", "kept"] = "expected",
) -> Tensor:
    """What `drop_coefficients` means, in the plainest torch."""
    keep_TB = uniform_TB >= rate
    if keep_hardest:
        judged_TB = loss_TB if unit == "image" else loss_TB.mean(1, True).expand_as(loss_TB)
        keep_TB = keep_TB.scatter(0, judged_TB.argmax(0, keepdim=True), True)
    kept_TB = keep_TB.to(loss_TB.dtype)
    if divisor == "kept":
        return weight_T[:, None] * kept_TB / kept_TB.sum().clamp(min=1)
    return weight_T[:, None] * kept_TB / expected(loss_TB, rate, keep_hardest)


def expected(loss_TB: Tensor, rate: float, keep_hardest: bool) -> float:
    """The number of pairs that are kept on average."""
    teachers, images = loss_TB.shape
    certain = 1 if keep_hardest else 0
    return images * (certain + (teachers - certain) * (1 - rate))


# The Triton kernel


@triton.jit
def _load(x, teacher, image, teachers, images):
    """A block (T, B) of a dense matrix in fp32, -inf outside."""
    mask = (teacher < teachers)[:, None] & (image < images)[None, :]
    at = teacher[:, None].to(tl.int64) * images + image[None, :]
    return tl.load(x + at, mask=mask, other=-float("inf")).to(tl.float32), at, mask


@triton.jit
def _keep(loss, uniform, hardest_T, teacher, image, teachers, images, rate,
          HARDEST: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Which pairs of a block are kept."""
    uniform_TB, at, mask = _load(uniform, teacher, image, teachers, images)
    keep_TB = uniform_TB >= rate
    if HARDEST and STEP:
        keep_TB = keep_TB | (teacher == hardest_T)[:, None]
    elif HARDEST:
        loss_TB, _, _ = _load(loss, teacher, image, teachers, images)
        keep_TB = keep_TB | (teacher[:, None] == _hardest(loss_TB)[None, :])
    return keep_TB & mask, at, mask


@triton.jit
def _hardest(loss_T):
    """Index of the largest along the first axis."""
    return tl.argmax(tl.where(loss_T == loss_T, loss_T, float("inf")), 0, tie_break_left=True)


@triton.jit(do_not_specialize=["teachers", "images"])
def drop(
    loss, uniform, weight, out, teachers, images, rate, divisor,
    HARDEST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
    TEACHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All coefficients, by one program."""
    teacher = tl.arange(0, TEACHERS)
    hardest = 0
    if HARDEST and STEP:
        total_T = tl.zeros((TEACHERS,), tl.float32)
        for start in range(0, images, BLOCK):
            image = start + tl.arange(0, BLOCK)
            loss_TB, _, mask = _load(loss, teacher, image, teachers, images)
            total_T += tl.sum(tl.where(mask, loss_TB, 0.0), 1)
        hardest = _hardest(tl.where(teacher < teachers, total_T, -float("inf")))
    if COUNT:
        count = 0.0
        for start in range(0, images, BLOCK):
            image = start + tl.arange(0, BLOCK)
            keep_TB, _, _ = _keep(
                loss, uniform, hardest, teacher, image, teachers, images, rate, HARDEST, STEP
            )
            count += tl.sum(tl.sum(keep_TB.to(tl.float32), 1), 0)
        divisor = tl.maximum(count, 1.0)
    weight_T = tl.load(weight + teacher, mask=teacher < teachers, other=0.0).to(tl.float32)
    for start in range(0, images, BLOCK):
        image = start + tl.arange(0, BLOCK)
        keep_TB, at, mask = _keep(
            loss, uniform, hardest, teacher, image, teachers, images, rate, HARDEST, STEP
        )
        tl.store(out + at, tl.where(keep_TB, weight_T[:, None] / divisor, 0.0), mask=mask)


BLOCK = 128
"""Images that the program looks at together."""


def drop_triton(
    loss_TB: Tensor, uniform_TB: Tensor, weight_T: Tensor, rate: float, plan: list[bool]
) -> Tensor:
    """One launch; `plan` says whether the hardest stays, is that of the step, pairs are counted."""
    weight_TB = torch.empty_like(loss_TB, memory_format=torch.contiguous_format)
    teachers, images = loss_TB.shape
    if not images:
        return weight_TB
    with beside(loss_TB):
        drop[(1,)](
            loss_TB.contiguous(),
            uniform_TB.contiguous(),
            weight_T.contiguous(),
            weight_TB,
            teachers,
            images,
            rate,
            expected(loss_TB, rate, plan[0]),
            HARDEST=plan[0],
            STEP=plan[1],
            COUNT=plan[2],
            TEACHERS=triton.next_power_of_2(teachers),
            BLOCK=BLOCK,
            num_warps=4,
        )
    return weight_TB


def builds(arch: int) -> Iterator[Build]:
    """Every variant that ships, the same on all architectures."""
    types = dict.fromkeys(("loss", "uniform", "weight", "out"), "*fp32")
    types |= dict.fromkeys(("teachers", "images"), "i32")
    types |= dict.fromkeys(("rate", "divisor"), "fp32")
    for plan in ("image", "step", "any"):
        for count in (False, True):
            constants: dict[str, int] = {"TEACHERS": 4, "BLOCK": BLOCK, "COUNT": count}
            constants |= {"HARDEST": plan != "any", "STEP": plan == "step"}
            name = f"drop {plan} {'kept' if count else 'expected'}"
            yield Build(name, drop, types, constants, {"num_warps": 4})


# The op


@torch.library.custom_op("unic_kernels::drop_coefficients", mutates_args=(), device_types="cpu")
def _drop(
    loss_TB: Tensor, uniform_TB: Tensor, weight_T: Tensor, rate: float, plan: list[bool]
) -> Tensor:
    return drop_coefficients_ref(
        loss_TB,
        uniform_TB,
        weight_T,
        rate=rate,
        keep_hardest=plan[0],
        unit="step" if plan[1] else "image",
        divisor="kept" if plan[2] else "expected",
    )


_drop.register_kernel("cuda")(drop_triton)


@_drop.register_fake
def _(loss_TB: Tensor, *_: object) -> Tensor:
    return torch.empty_like(loss_TB, memory_format=torch.contiguous_format)


# The public functions


def drop_coefficients(
    loss_TB: Tensor,
    uniform_TB: Tensor,
    weight_T: Tensor,
    *,
    rate: float,
    keep_hardest: bool = True,
    unit: Literal["image", "step"] = "image",
    divisor: Literal["expected", "kept"] = "expected",
) -> Tensor:
    """Coefficients (T, B) of teacher dropping; no gradient.

    With unit `step`, `uniform_TB` must be equal along an image's row already.
    """
    if loss_TB.dim() != 2 or not len(loss_TB) or uniform_TB.shape != loss_TB.shape:
        found = f"{tuple(loss_TB.shape)} and {tuple(uniform_TB.shape)}"
        raise ValueError(f"losses and uniforms must be of one shape (T, B), got {found}")
    if weight_T.shape != loss_TB.shape[:1]:
        raise ValueError(f"{len(loss_TB)} teachers want as many weights, got {weight_T.tolist()}")
    if not 0 <= rate <= 1 or (rate == 1 and not keep_hardest):
        raise ValueError(f"rate must be in [0, 1], and < 1 without keep_hardest, got {rate}")
    plan = [keep_hardest, unit == "step", divisor == "kept"]
    return _drop(loss_TB.detach(), uniform_TB, weight_T, rate, plan)


class Distilled(NamedTuple):
    """The loss of a micro batch and what it was made of; only `loss` and `loss_TB` lead back."""

    loss: Tensor
    loss_TB: Tensor
    weight_TB: Tensor
    gap_T22: Tensor  # mean over images: teacher, (cls, patch), (cosine, smooth_l1)


def distill_loss(
    pred: Sequence[Pair],
    target: Sequence[Pair],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    uniform_TB: Tensor,
    *,
    distances: Sequence[Distance],
    balance: Balance,
    refine: Refine | None = None,
    clamp: float = 0.0,
    eps: float = 1e-6,
) -> Distilled:
    """The loss of a micro batch: `image_losses` (whose arguments these are) x `balance`, summed.

    `refine` may make other losses (T, B) of those, before they are balanced.
    """
    options: dict[str, Any] = {"distances": distances, "clamp": clamp, "eps": eps}
    return balanced(image_losses(pred, target, mean, std, **options), uniform_TB, balance, refine)


def distill_loss_ref(
    pred: Sequence[Pair],
    target: Sequence[Pair],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    uniform_TB: Tensor,
    *,
    balance: Balance,
    refine: Refine | None = None,
    **options: Any,
) -> Distilled:
    """What `distill_loss` means, in the plainest torch."""
    found = image_losses_ref(pred, target, mean, std, **options)
    return balanced(found, uniform_TB, balance, refine)


def balanced(
    losses: tuple[Tensor, Tensor], uniform_TB: Tensor, balance: Balance, refine: Refine | None
) -> Distilled:
    """Losses and gaps per teacher and image, refined, balanced, summed."""
    loss_TB, gap_TB22 = losses
    loss_TB = refine(loss_TB) if refine else loss_TB
    weight_TB = balance(loss_TB.detach(), uniform_TB)
    return Distilled((loss_TB * weight_TB).sum(), loss_TB, weight_TB, gap_TB22.mean(1))


# Cases that tests and benchmarks share


@dataclass(frozen=True, kw_only=True)
class Case:
    """Losses by their sizes; `options` are those of `drop_coefficients`."""

    teachers: int
    images: int
    rate: float = 0.5
    keep_hardest: bool = True
    unit: Literal["image", "step"] = "image"
    divisor: Literal["expected", "kept"] = "expected"

    def __str__(self) -> str:
        hardest = "" if self.keep_hardest else " any"
        sizes = f"{self.teachers}x{self.images} p={self.rate}"
        return f"{sizes} {self.unit} {self.divisor}{hardest}"

    @property
    def options(self) -> dict[str, object]:
        return {x: getattr(self, x) for x in ("rate", "keep_hardest", "unit", "divisor")}

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Losses, uniforms and weights."""
        g = torch.Generator().manual_seed(self.teachers * 1000 + self.images)
        loss_TB, uniform_TB = torch.rand(2, self.teachers, self.images, generator=g).to(device)
        if self.unit == "step":
            uniform_TB = uniform_TB[:, :1].expand_as(uniform_TB)
        return loss_TB, uniform_TB, torch.rand(self.teachers, generator=g).to(device) + 0.5


CASES = (
    Case(teachers=1, images=1),
    Case(teachers=4, images=64),
    Case(teachers=4, images=64, divisor="kept"),
    Case(teachers=3, images=300, rate=0.25),
    Case(teachers=3, images=129, unit="step", rate=1.0),
    Case(teachers=5, images=7, unit="step", divisor="kept"),
    Case(teachers=2, images=257, keep_hardest=False),
    Case(teachers=2, images=2, keep_hardest=False, rate=0.99, divisor="kept"),
    Case(teachers=4, images=9, rate=0.0),
    Case(teachers=6, images=33, rate=1.0, divisor="kept"),
)
