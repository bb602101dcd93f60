"""Distance of predictions from standardised targets, per teacher and image, in one pass.

For a token with prediction p and raw feature x of a teacher with C channels:

    t = clip((x - mean) / (std + eps), -clamp, clamp)        d = p - t
    cosine    = p.t / (max(|p|, 1e-8) max(|t|, 1e-8))        as torch's cosine_similarity
    smooth_l1 = mean_c (d^2 / 2 if |d| < 1, else |d| - 1/2)
    mse       = mean_c d^2
    loss of a token  = w1 (1 - cosine) + w2 smooth_l1 + w3 mse
    loss of an image = mean over the kinds of token of the mean over a kind's tokens

With g the gradient of an image's loss, shared over the n tokens of a kind and the kinds:

    dp = g/n (w1 [cosine p / (max(|p|, 1e-8) |p|) - t / (max(|p|, 1e-8) max(|t|, 1e-8))]
              + w2 clip(d, -1, 1) / C + w3 2 d / C),  its first term 0 if |p| = 0

Forward reads p and x once, whatever C, and keeps p.t, |p|^2 and |t|^2 of every row in fp32.
Backward reads both once more, except those of images whose g is exactly 0: their dp is 0.

Shapes: T teachers, B images, N patch tokens, R = 1 + N rows (CLS first), 2 kinds (cls, patch),
J chunks of rows. Lists of tensors go teacher by teacher, in each cls then patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from unic_kernels import custom_op
from unic_kernels.dtype import upcast
from unic_kernels.image_losses import cpu, launch
from unic_kernels.image_losses.arguments import (
    TERMS,
    BackwardArguments,
    Distance,
    ForwardArguments,
    Pair,
    Results,
)


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
    """Return the loss of every teacher and image [T, B], and cosine and smooth_l1 of both kinds of
    token [T, B, 2, 2].

    One entry per teacher: predictions, raw features, mean and std [2, C] (floored already), and
    weights of the terms. `clamp` 0 is off. Losses lead to predictions only; the second result has
    no gradient, and 0 for kinds that are not learned. Rungs that are judged each on its own are
    further entries with the same target. Entries may have other numbers of patch tokens: those with
    the same are one call of the op. ValueError if lists or shapes do not fit each other.
    """
    check(pred, target, mean, std, distances)
    order: list[int] = []
    found: list[tuple[Tensor, Tensor]] = []
    for group in equal_patches(pred, distances):
        given = forward_arguments(
            [pred[i] for i in group],
            [target[i] for i in group],
            [mean[i] for i in group],
            [std[i] for i in group],
            [distances[i] for i in group],
            clamp,
            eps,
        )
        loss_TB, gap_TB22, _ = FORWARD(*given)
        order += group
        found.append((loss_TB, gap_TB22))
    if len(found) == 1:
        return found[0]
    places = sorted(range(len(order)), key=order.__getitem__)
    losses, gaps = (torch.cat(parts).unbind() for parts in zip(*found, strict=True))
    return torch.stack([losses[i] for i in places]), torch.stack([gaps[i] for i in places])


def equal_patches(pred: Sequence[Pair], distances: Sequence[Distance]) -> list[list[int]]:
    """Return the entries in groups of as many patch tokens; those without join the first."""
    groups: dict[int, list[int]] = {}
    without: list[int] = []
    for i, (tokens, (_, patch)) in enumerate(zip(pred, distances, strict=True)):
        (groups.setdefault(tokens[1].shape[1], []) if patch else without).append(i)
    first, *others = list(groups.values()) or [[]]
    return [sorted([*first, *without]), *others]


def forward_arguments(
    pred: Sequence[Pair],
    target: Sequence[Pair],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    distances: Sequence[Distance],
    clamp: float,
    eps: float,
) -> ForwardArguments:
    """Return the arguments of the op; a weight is shared by the kinds learned and their tokens."""
    weight: list[float] = []
    for tokens, distance in zip(pred, distances, strict=True):
        for kind, terms in enumerate(distance):
            count = sum(map(bool, distance)) * (tokens[1].shape[1] if kind and terms else 1)
            weight += [terms.get(name, 0.0) / count for name in TERMS]
    return ForwardArguments(
        pred=[x for pair in pred for x in pair],
        target=[x.detach() for pair in target for x in pair],
        mean=[upcast(x.detach()) for x in mean],
        std=[upcast(x.detach()) for x in std],
        weight=weight,
        learned=[bool(terms) for distance in distances for terms in distance],
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
    """Raise ValueError unless lists and shapes fit each other."""
    sizes = [len(x) for x in (pred, target, mean, std, distances)]
    if not sizes[0] or len(set(sizes)) > 1:
        raise ValueError(
            f"pred, target, mean, std, distances need one entry a teacher, got {sizes}"
        )
    images: int | None = None
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
            if images is None:
                images = shapes[0][0]
            if shapes[0][0] != images:
                raise ValueError(f"teacher {i} has {shapes[0][0]} images, others {images}")


FORWARD = custom_op.define(
    "image_losses",
    ForwardArguments,
    "(Tensor, Tensor, Tensor)",
    cpu=cpu.forward,
    cuda=launch.forward,
    fake=ForwardArguments.empty_results,
)
BACKWARD = custom_op.define(
    "image_losses_backward",
    BackwardArguments,
    "Tensor[]",
    cpu=cpu.backward,
    cuda=launch.backward,
    fake=lambda both: both.forward.empty_grads(),
)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    """Keep what backward reads: references to all inputs, and the row statistics."""
    given, (_, gap_TB22, stat_TBR3) = ForwardArguments(*inputs), output
    ctx.weight, ctx.learned, ctx.clamp, ctx.eps = given[4:]
    groups = (given.pred, given.target, given.mean, given.std)
    ctx.ends = [0, *accumulate(map(len, groups))]
    ctx.save_for_backward(*(tensor for group in groups for tensor in group), stat_TBR3)
    ctx.mark_non_differentiable(gap_TB22, stat_TBR3)


def differentiate(ctx: Any, grad_TB: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    """Return the gradients of the forward op's arguments: those of predictions, None for others."""
    *tensors, stat_TBR3 = ctx.saved_tensors
    pred, target, mean, std = (list(tensors[a:b]) for a, b in pairwise(ctx.ends))
    given = BackwardArguments(
        pred,
        target,
        mean,
        std,
        ctx.weight,
        ctx.learned,
        ctx.clamp,
        ctx.eps,
        stat_TBR3=stat_TBR3,
        grad_TB=grad_TB,
    )
    found = iter(BACKWARD(*given))
    grads = [next(found) if learned else None for learned in given.learned]
    none_for_lists = ([None] * len(group) for group in (target, mean, std))
    return grads, *none_for_lists, None, None, None, None


FORWARD.register_autograd(differentiate, setup_context=save_for_backward)
