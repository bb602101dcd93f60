"""Distance of predictions from standardised targets, per teacher and image, in one pass.

For a token with prediction p and raw feature x of a teacher with C channels:

    t = clip((x - mean) / (std + eps), -clamp, clamp)        d = p - t
    cosine    = p.t / (max(|p|, 1e-8) max(|t|, 1e-8))        as torch's cosine_similarity
    smooth_l1 = mean_c (d^2 / 2 where |d| < 1, else |d| - 1/2)
    mse       = mean_c d^2
    loss of a token  = w1 (1 - cosine) + w2 smooth_l1 + w3 mse
    loss of an image = mean over the kinds of token of the mean over a kind's tokens

With g the gradient of an image's loss, shared over the n tokens of a kind and the kinds:

    dp = g/n (w1 [cosine p / (max(|p|, 1e-8) |p|) - t / (max(|p|, 1e-8) max(|t|, 1e-8))]
              + w2 clip(d, -1, 1) / C + w3 2 d / C),  its first term 0 where |p| = 0

Forward reads p and x once, whatever C, and keeps p.t, |p|^2 and |t|^2 of every row in fp32.
Backward reads both once more, except those of images whose g is exactly 0: their dp is 0.

Shapes: T teachers, B images, N patch tokens, R = 1 + N rows (CLS first), 2 kinds (cls, patch),
J chunks of rows. Lists of tensors go teacher by teacher, in each cls then patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_kernels.device import wide
from unic_kernels.image_losses.kernels import (
    Lists,
    backward_triton,
    empty_grads,
    empty_results,
    forward_triton,
)

TERMS = ("cosine", "smooth_l1", "mse")
SMALL = 1e-8
"""The least norm that a cosine divides by, torch's default."""

Pair = tuple[Tensor, Tensor]
"""CLS tokens [B, C] and patch tokens [B, N, C] of one model; a kind that is not learned: any."""
Distance = tuple[Mapping[str, float], Mapping[str, float]]
"""Weights of the terms of cls and of patch tokens; none: the kind is not learned."""


# The torch reference


def image_losses_ref(
    pred: Sequence[Pair],
    target: Sequence[Pair],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    *,
    distances: Sequence[Distance],
    clamp: float = 0.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """What `image_losses` means, in the plainest torch."""
    losses, gaps = [], []
    for tokens, raw, mean_2C, std_2C, distance in zip(
        pred, target, mean, std, distances, strict=True
    ):
        kinds = []
        gap_22B = mean_2C.new_zeros(2, 2, len(raw[0]))
        for kind, terms in enumerate(distance):
            if not terms:
                continue
            p_BC, x_BC = wide(tokens[kind]), wide(raw[kind])
            t_BC = (x_BC - mean_2C[kind]) / (std_2C[kind] + eps)
            t_BC = t_BC.clamp(-clamp, clamp) if clamp else t_BC
            cosine_B = F.cosine_similarity(p_BC, t_BC, dim=-1)
            smooth_l1_B = F.smooth_l1_loss(p_BC, t_BC, reduction="none").mean(-1)
            mse_B = F.mse_loss(p_BC, t_BC, reduction="none").mean(-1)
            found = zip(TERMS, (1 - cosine_B, smooth_l1_B, mse_B), strict=True)
            weighted = torch.stack([terms.get(name, 0.0) * value_B for name, value_B in found])
            kinds.append(weighted.sum(0).reshape(len(p_BC), -1).mean(1))
            for i, value_B in enumerate((cosine_B, smooth_l1_B)):
                gap_22B[kind, i] = value_B.detach().reshape(len(value_B), -1).mean(1)
        losses.append(torch.stack(kinds).mean(0))
        gaps.append(gap_22B.movedim(2, 0))
    return torch.stack(losses), torch.stack(gaps)


# The same algebra in torch, for CPU tensors

IN_CACHE = 2**18
"""Values of a tensor that a core's cache holds beside those of a few others."""


def kinds_of(given: Lists) -> Iterator[tuple[int, int, list[float]]]:
    """Teacher, kind and weights of the terms, of whatever is learned."""
    for i, look in enumerate(given.looks):
        if look:
            yield *divmod(i, 2), given.weight[3 * i : 3 * i + 3]


def a_few(given: Lists, teacher: int, image_B: Tensor) -> Sequence[Tensor]:
    """`image_B` in parts, small enough that what passes between operations stays in the cache."""
    values = max(1, given.extent[2]) * given.mean[teacher].shape[1]
    return image_B.split(max(1, IN_CACHE // max(1, values)))


def rows_of(given: Lists, teacher: int, kind: int, image_B: Tensor) -> Pair:
    """Predictions and standardised targets [B, n, C] of some images."""
    i = 2 * teacher + kind
    p_BnC, x_BnC = (wide(side[i][image_B]) for side in (given.pred, given.target))
    if not kind:
        p_BnC, x_BnC = p_BnC[:, None], x_BnC[:, None]
    t_BnC = (x_BnC - given.mean[teacher][kind]) / (given.std[teacher][kind] + given.eps)
    return p_BnC, t_BnC.clamp_(-given.clamp, given.clamp)


def forward_torch(given: Lists) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, gaps and row statistics, as the kernels give them."""
    loss_TB, gap_TB22, stat_TBR3 = (x.zero_() for x in empty_results(given))
    every_B = torch.arange(given.extent[1])
    for teacher, kind, (w1, w2, w3) in kinds_of(given):
        for image in a_few(given, teacher, every_B):
            p_BnC, t_BnC = rows_of(given, teacher, kind, image)
            pairs = ((p_BnC, t_BnC), (p_BnC, p_BnC), (t_BnC, t_BnC))
            pt_Bn, pp_Bn, tt_Bn = dots = [(a * b).sum(2) for a, b in pairs]
            stat_TBR3[teacher, image, kind : kind + pt_Bn.shape[1]] = torch.stack(dots, 2)
            cosine_Bn = pt_Bn / (pp_Bn.sqrt().clamp(min=SMALL) * tt_Bn.sqrt().clamp(min=SMALL))
            smooth_l1_Bn = F.smooth_l1_loss(p_BnC, t_BnC, reduction="none").mean(2)
            loss_Bn = w1 * (1 - cosine_Bn) + w2 * smooth_l1_Bn
            if w3:
                loss_Bn += w3 * F.mse_loss(p_BnC, t_BnC, reduction="none").mean(2)
            loss_TB[teacher, image] += loss_Bn.sum(1)
            gap_TB22[teacher, image, kind] = torch.stack([cosine_Bn, smooth_l1_Bn], 2).mean(1)
    return loss_TB, gap_TB22, stat_TBR3


def backward_torch(given: Lists, stat_TBR3: Tensor, grad_TB: Tensor) -> list[Tensor]:
    """Gradients of the kinds that are learned, of images whose gradient is not 0."""
    grads = [x.zero_() for x in empty_grads(given)]
    for grad, (teacher, kind, weights) in zip(grads, kinds_of(given), strict=True):
        for image in a_few(given, teacher, grad_TB[teacher].nonzero().squeeze(1)):
            p_BnC, t_BnC = rows_of(given, teacher, kind, image)
            stat_Bn3 = stat_TBR3[teacher, image, kind : kind + p_BnC.shape[1]]
            g_B11 = grad_TB[teacher, image, None, None]
            value_BnC = g_B11 * slope(p_BnC, t_BnC, stat_Bn3, weights)
            grad[image] = value_BnC.view(len(image), *grad.shape[1:]).to(grad.dtype)
    return grads


def slope(p_BnC: Tensor, t_BnC: Tensor, stat_Bn3: Tensor, weights: Sequence[float]) -> Tensor:
    """Derivative of the weighted terms by the predictions."""
    w1, w2, w3 = weights
    pt_Bn, pp_Bn, tt_Bn = stat_Bn3.unbind(2)
    norm_Bn, large_Bn = pp_Bn.sqrt(), pp_Bn.sqrt().clamp(min=SMALL)
    by_t_Bn = 1 / (large_Bn * tt_Bn.sqrt().clamp(min=SMALL))
    by_p_Bn = (pt_Bn * by_t_Bn / (large_Bn * norm_Bn)).masked_fill(norm_Bn == 0, 0)
    slope_BnC = (w1 * by_p_Bn)[..., None] * p_BnC - (w1 * by_t_Bn)[..., None] * t_BnC
    if w2 or w3:
        d_BnC = p_BnC - t_BnC
        slope_BnC.add_(d_BnC.clamp(-1, 1), alpha=w2 / p_BnC.shape[2])
        slope_BnC.add_(d_BnC, alpha=2 * w3 / p_BnC.shape[2])
    return slope_BnC


# The ops


@torch.library.custom_op("unic_kernels::image_losses", mutates_args=(), device_types="cpu")
def _forward(
    pred: list[Tensor],
    target: list[Tensor],
    mean: list[Tensor],
    std: list[Tensor],
    weight: list[float],
    looks: list[bool],
    clamp: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return forward_torch(Lists(pred, target, mean, std, weight, looks, clamp, eps))


@torch.library.custom_op("unic_kernels::image_losses_backward", mutates_args=(), device_types="cpu")
def _backward(
    pred: list[Tensor],
    target: list[Tensor],
    mean: list[Tensor],
    std: list[Tensor],
    weight: list[float],
    looks: list[bool],
    clamp: float,
    eps: float,
    stat_TBR3: Tensor,
    grad_TB: Tensor,
) -> list[Tensor]:
    given = Lists(pred, target, mean, std, weight, looks, clamp, eps)
    return backward_torch(given, stat_TBR3, grad_TB)


_forward.register_kernel("cuda")(lambda *given: forward_triton(Lists(*given)))
_backward.register_kernel("cuda")(lambda *given: backward_triton(Lists(*given[:8]), *given[8:]))
_forward.register_fake(lambda *given: empty_results(Lists(*given)))
_backward.register_fake(lambda *given: empty_grads(Lists(*given[:8])))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pred, target, mean, std, *ctx.plain = inputs
    ctx.save_for_backward(*pred, *target, *mean, *std, output[2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad_TB: Tensor, *_: Tensor) -> tuple[Any, ...]:
    *tensors, stat_TBR3 = ctx.saved_tensors
    teachers = len(tensors) // 6
    ends = (2 * teachers, 4 * teachers, 5 * teachers)
    lists = [list(part) for part in (tensors[a:b] for a, b in pairwise((0, *ends, None)))]
    found = iter(_backward(*lists, *ctx.plain, stat_TBR3, grad_TB))
    grads = [next(found) if look else None for look in ctx.plain[1]]
    return grads, *([None] * len(part) for part in lists[1:]), *([None] * 4)


_forward.register_autograd(_differentiate, setup_context=_setup)


# The public function


def image_losses(
    pred: Sequence[Pair],
    target: Sequence[Pair],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    *,
    distances: Sequence[Distance],
    clamp: float = 0.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Loss of every teacher and image [T, B], and cosine and smooth_l1 of both kinds [T, B, 2, 2].

    One entry per teacher: predictions, raw features, mean and std [2, C] (floored already), and
    weights of the terms. `clamp` 0 is off. Losses lead to predictions only; the second result has
    no gradient, and 0 for kinds that are not learned. Rungs that are judged each on its own are
    further entries with the same target.
    """
    check(pred, target, mean, std, distances)
    loss_TB, gap_TB22, _ = _forward(*lists(pred, target, mean, std, distances, clamp, eps))
    return loss_TB, gap_TB22


def lists(
    pred: Sequence[Pair],
    target: Sequence[Pair],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    distances: Sequence[Distance],
    clamp: float,
    eps: float,
) -> Lists:
    """Arguments of the op; a weight is shared by the kinds learned and by a kind's tokens."""
    weight: list[float] = []
    for tokens, distance in zip(pred, distances, strict=True):
        for kind, terms in enumerate(distance):
            count = sum(map(bool, distance)) * (tokens[1].shape[1] if kind and terms else 1)
            weight += [terms.get(name, 0.0) / count for name in TERMS]
    return Lists(
        pred=[x for pair in pred for x in pair],
        target=[x.detach() for pair in target for x in pair],
        mean=[wide(x.detach()) for x in mean],
        std=[wide(x.detach()) for x in std],
        weight=weight,
        looks=[bool(terms) for distance in distances for terms in distance],
        clamp=clamp or math.inf,
        eps=eps,
    )


def check(
    pred: Sequence[Pair],
    target: Sequence[Pair],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    distances: Sequence[Distance],
) -> None:
    """ValueError unless lists and shapes fit each other."""
    sizes = [len(x) for x in (pred, target, mean, std, distances)]
    if not sizes[0] or len(set(sizes)) > 1:
        raise ValueError(
            f"pred, target, mean, std, distances need one entry a teacher, got {sizes}"
        )
    extents: dict[str, int] = {}
    for i, (tokens, raw, distance) in enumerate(zip(pred, target, distances, strict=True)):
        if unknown := {name for terms in distance for name in terms} - set(TERMS):
            raise ValueError(f"teacher {i} has terms {sorted(unknown)}; add them to the losses")
        if not any(distance):
            raise ValueError(f"teacher {i} has no terms; leave it out or give it a distance")
        learned = [k for k in (0, 1) if distance[k]]
        if len({tokens[k].dtype for k in learned}) > 1 or len({raw[k].dtype for k in learned}) > 1:
            raise ValueError(f"teacher {i} has cls and patch tokens of two dtypes; cast one")
        for k in learned:
            shapes = [tuple(x.shape) for x in (tokens[k], raw[k], mean[i], std[i])]
            width = shapes[0][-1]
            fit = len(shapes[0]) == 2 + k and 0 not in shapes[0][1:]
            if not fit or shapes[1:] != [shapes[0], (2, width), (2, width)]:
                raise ValueError(f"teacher {i}, kind {k}: pred, target, mean, std are {shapes}")
            for name, size in zip(("images", "patch tokens"), shapes[0][: 1 + k], strict=False):
                if extents.setdefault(name, size) != size:
                    raise ValueError(f"teacher {i} has {size} {name}, others {extents[name]}")


# Cases that tests and benchmarks share

BOTH = {"cosine": 0.5, "smooth_l1": 0.5}
ALL = {"cosine": 0.9, "smooth_l1": 0.1, "mse": 0.3}


class Example(NamedTuple):
    """Arguments of `image_losses`, and the gradient that comes back."""

    pred: list[Pair]
    target: list[Pair]
    mean: list[Tensor]
    std: list[Tensor]
    grad_TB: Tensor

    def leaves(self) -> list[Tensor]:
        return [x for pair in self.pred for x in pair]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch by its sizes; `kept` is the share of (teacher, image) pairs with a gradient."""

    name: str
    images: int = 3
    patches: int = 5
    widths: tuple[int, ...] = (96,)
    distances: tuple[Distance, ...] = ((BOTH, BOTH),)
    clamp: float = 10.0
    kept: float = 0.6
    strided: bool = False  # patch tokens are x[:, 1:] of a longer sequence

    def __str__(self) -> str:
        return self.name

    def make(
        self, dtype: torch.dtype, device: str = "cpu", raw: torch.dtype | None = None
    ) -> Example:
        """Random tokens whose channels differ in mean and spread; predictions want gradients."""
        g = torch.Generator().manual_seed(len(self.name))

        def tokens(width: int, kind: torch.dtype, spread: float) -> Pair:
            scale_C = torch.rand(width, generator=g) * spread + 0.2
            x_BNC = torch.randn(self.images, 1 + self.patches, width, generator=g) * scale_C
            x_BNC = (x_BNC + scale_C.flip(0) * spread).to(device, kind)
            return x_BNC[:, 0], x_BNC[:, 1:] if self.strided else x_BNC[:, 1:].contiguous()

        high = torch.promote_types(dtype, torch.float32)
        pred = [tokens(width, dtype, 0.0) for width in self.widths]
        target = [tokens(width, raw or dtype, 3.0) for width in self.widths]
        mean = [torch.rand(2, w, generator=g).to(device, high) * 3 for w in self.widths]
        std = [torch.rand(2, w, generator=g).to(device, high) + 0.3 for w in self.widths]
        shape = (len(self.widths), self.images)
        kept_TB = torch.rand(shape, generator=g) < self.kept
        grad_TB = (torch.rand(shape, generator=g) * kept_TB).to(device, high)
        for pair in pred:
            for x in pair:
                x.requires_grad_()
        return Example(pred, target, mean, std, grad_TB)


CASES = (
    Case(name="one image", images=1, patches=1, kept=1.0),
    Case(name="odd", images=5, patches=19, widths=(200,), distances=((ALL, ALL),)),
    Case(name="no clamp", clamp=0.0, widths=(257,)),
    Case(name="patch only", distances=(({}, ALL),), patches=8),
    Case(name="cls only", distances=((BOTH, {}),)),
    Case(name="weight 0", distances=(({"cosine": 0.0}, {"mse": 1.0}),)),
    Case(
        name="four teachers",
        patches=9,
        widths=(96, 200, 64, 300),
        distances=((BOTH, BOTH), ({}, ALL), (ALL, BOTH), ({"cosine": 1.0}, {})),
        strided=True,
    ),
    Case(name="all dropped", kept=0.0),
    Case(name="all kept", kept=1.1, strided=True, widths=(96, 40), distances=((BOTH, ALL),) * 2),
)
