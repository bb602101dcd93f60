"""The distillation loss: distances between predictions and targets per (teacher, image), balanced.

A token's loss is a weighted sum of `TERMS` (method: section 3); per teacher and image it is the
mean of the CLS loss and the mean patch loss, or one of both. The terms that `unic_kernels` has are
one op; all others are added in plain torch. Tensors in, tensors out, no host read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from unic_ds import config
from unic_ds.losses.balancer import Balancer
from unic_ds.losses.mgda import gram
from unic_ds.losses.terms import TERMS, AllGather, Context, no_dispersion
from unic_ds.models.resolution import Overlaps
from unic_ds.tokens import KINDS, Shared, Target, Tokens, enlarged, part_of_map
from unic_kernels.distill_loss import Distilled
from unic_kernels.image_losses.arguments import TERMS as FUSED_TERMS
from unic_kernels.ops import FUSED, Ops


def no_gather(target_BC: Tensor) -> tuple[Tensor, int]:
    """`AllGather` of a single process: its own targets, which begin at 0."""
    return target_BC, 0


class Row(NamedTuple):
    """One teacher's prediction and target, and the terms between them."""

    pred: Tokens
    target: Target
    distance: config.Distance
    dispersion: Callable[[Tensor], Tensor] = no_dispersion
    counted_B: Tensor | None = None  # True for images that have the loss; None: all

    def on_larger_grid(self) -> Row:
        """The same with the prediction's patch map on the target's grid, if that is larger."""
        if not self.distance.patch:
            return self
        count, own = self.target.features.patch_BNC.shape[1], self.pred.patch_BNC
        if own.shape[-2] >= count:
            return self
        return self._replace(pred=Tokens(self.pred.cls_BC, enlarged(own, round(count**0.5))))

    def on_overlaps(self, overlaps: Overlaps | None) -> Row:
        """The same with the patches that student and teacher both see, if their images differ."""
        if overlaps is None or not self.distance.patch:
            return self
        (cls_BC, patch_BNC), features = self.pred, self.target.features
        theirs = features._replace(patch_BNC=part_of_map(features.patch_BNC, overlaps[1]))
        return self._replace(
            pred=Tokens(cls_BC, part_of_map(patch_BNC, overlaps[0])),
            target=self.target._replace(features=theirs),
        )

    def by_kind(self, kinds_2B: Tensor | None) -> list[Row]:
        """A row per kind of token, with the images that have its loss; of None this row alone."""
        if kinds_2B is None:
            return [self]
        rows = []
        for kind, counted_B, terms in zip(KINDS, kinds_2B.unbind(), self.distance, strict=True):
            if terms:
                distance = config.Distance({}, {})._replace(**{kind: terms})
                both_B = counted_B if self.counted_B is None else counted_B & self.counted_B
                rows.append(self._replace(distance=distance, counted_B=both_B))
        return rows

    def rungs(self) -> list[Tokens]:
        """Predictions with a loss each: those along a leading rung axis, or the one."""
        kind = 0 if self.distance.cls else 1
        if self.pred[kind].dim() == self.target.features[kind].dim():
            return [self.pred]
        count, pairs = len(self.pred[kind]), zip(self.pred, self.distance, strict=True)
        sides = [x if terms else [x] * count for x, terms in pairs]
        return [Tokens(*pair) for pair in zip(*sides, strict=True)]

    def fused_terms(self) -> tuple[dict[str, float], dict[str, float]]:
        """Weights of the terms in the fused op, for CLS and patch tokens.

        A kind with other terms alone has cosine at weight 0 there: the log shows its distances.
        """
        cls, patch = (
            {term: weight for term, weight in terms.items() if term in FUSED_TERMS}
            or ({"cosine": 0.0} if terms else {})
            for terms in self.distance
        )
        return cls, patch

    def other_terms(self) -> Iterator[tuple[int, str, float]]:
        """(kind of token, name, weight) of the terms that are not in the fused op."""
        for kind, terms in enumerate(self.distance):
            for term, weight in terms.items():
                if term not in FUSED_TERMS:
                    yield kind, term, weight

    def other_loss(self, context: Context) -> Tensor | None:
        """Share of the loss per image [B] that is not in the fused op; None without such terms."""
        losses = []
        context = context._replace(dispersion=self.dispersion)
        for kind, term, weight in self.other_terms():
            loss_LB = TERMS[term](self.pred[kind].float(), self.target.kind(kind), context)
            loss_LB = loss_LB.mean(-1) if KINDS[kind] == "patch" else loss_LB  # of [L, B, N]
            loss_B = loss_LB if loss_LB.dim() == 1 else loss_LB.mean(0)
            losses.append(weight / len(self.distance.kinds) * loss_B)
        return torch.stack(losses).sum(0) if losses else None


def mean_of_rungs(x_E: Tensor, counts: Sequence[int]) -> Tensor:
    """Means over neighbours along the first axis, `counts` of them for each teacher."""
    if len(counts) == len(x_E):
        return x_E
    return torch.stack([part.mean(0) for part in x_E.split(list(counts))])


def mean_of_kinds(loss_RB: Tensor, counted_RB: Tensor, counts: Sequence[int]) -> Tensor:
    """Means over neighbours, `counts` of them for each teacher, that have the image; 0 if none."""
    kept_RB = torch.where(counted_RB, loss_RB, 0.0)
    groups = zip(kept_RB.split(list(counts)), counted_RB.split(list(counts)), strict=True)
    return torch.stack([x_KB.sum(0) / has_KB.sum(0).clamp(min=1) for x_KB, has_KB in groups])


def add_other_terms(loss_RB: Tensor, rows: Iterable[Row], context: Context) -> Tensor:
    """Losses per row and image with the terms that are not in the fused op."""
    others = [row.other_loss(context) for row in rows]
    if all(other_B is None for other_B in others):
        return loss_RB
    none_B = torch.zeros_like(loss_RB[0])
    return loss_RB + torch.stack([none_B if x_B is None else x_B for x_B in others])


def distill_loss(
    pred: Mapping[str, Tokens],
    target: Mapping[str, Target],
    uniform_TB: Tensor,
    *,
    loss: config.Loss,
    balance: Balancer,
    distances: Mapping[str, config.Distance] | None = None,
    all_gather_fn: AllGather = no_gather,
    ops: Ops = FUSED,
    shared: Shared | None = None,
    dispersions: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    overlaps: Overlaps | None = None,
    kinds_2B: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro batch and its metrics, detached on the device.

    `pred` and `target` are keyed by teacher in config order; `uniform_TB` decides the dropping;
    `distances` are those of teachers that differ from `loss`. The loss is a mean over the micro
    batch's images: average it over ranks and accumulation. A leading rung axis in `pred` is
    averaged: with `ladder.combine = each` every rung has its own loss. `shared` is what `pred` was
    copied from, for balancers that compare the teachers' gradients there. `dispersions` are those
    of teachers that have the term. A predicted map is resized to the target's grid, if that is
    larger. With `overlaps`, rows and columns of the student's grid and of the teachers', the losses
    of patch tokens compare those alone. `kinds_2B` is True for the kinds of token (cls, patch) that
    an image's loss has; a teacher's loss is the mean over those that it has too. None: all.
    """
    if shared:
        pred = {name: tokens.copies() for name, tokens in pred.items()}
    distances, dispersions = distances or {}, dispersions or {}
    rows = {
        name: Row(
            tokens,
            target[name],
            distances.get(name, loss.distance),
            dispersions.get(name, no_dispersion),
            target[name].computed_B,
        )
        .on_larger_grid()
        .on_overlaps(overlaps)
        for name, tokens in pred.items()
    }
    by_kind = {name: row.by_kind(kinds_2B) for name, row in rows.items()}
    parts = list(chain(*by_kind.values()))
    rungs = [row.rungs() for row in parts]
    counts = [len(predictions) for predictions in rungs]
    entries = [row for row, n in zip(parts, counts, strict=True) for _ in range(n)]
    context = Context(loss.temperature, all_gather_fn)
    computed_TB = counted_images(rows.values())
    counted_RB = None if kinds_2B is None else counted_images(parts)

    def refine(loss_EB: Tensor) -> Tensor:
        loss_TB = add_other_terms(mean_of_rungs(loss_EB, counts), parts, context)
        if counted_RB is not None:
            loss_TB = mean_of_kinds(loss_TB, counted_RB, [len(rows) for rows in by_kind.values()])
        if shared:
            balance.compare(gram(filled(loss_TB, computed_TB, 0.0), pred, shared), loss_TB.shape[1])
        return loss_TB

    found = ops.distill_loss(
        [tokens for predictions in rungs for tokens in predictions],
        [row.target.features for row in entries],
        [row.target.mean_2C for row in entries],
        [row.target.divisor_2C for row in entries],
        uniform_TB,
        distances=[row.fused_terms() for row in entries],
        balance=partial(coefficients, balance, computed_TB),
        refine=refine,
        clamp=entries[0].target.clamp,
        eps=0.0,  # the divisor has it
    )
    gap_R22 = mean_of_rungs(mean_gaps(found, counted_images(entries)), counts)
    loss_TB = found.loss_TB.detach()
    logged = metrics(by_kind, found, filled(loss_TB, computed_TB, torch.nan), gap_R22)
    return found.loss, logged | balance.metrics(filled(loss_TB, computed_TB, -torch.inf))


def coefficients(
    balance: Balancer, computed_TB: Tensor | None, loss_TB: Tensor, uniform_TB: Tensor
) -> Tensor:
    """Coefficients of the losses; 0 for pairs that are not computed."""
    weight_TB = balance(filled(loss_TB, computed_TB, -torch.inf), uniform_TB)
    return filled(weight_TB, computed_TB, 0.0)


def filled(x_TB: Tensor, computed_TB: Tensor | None, value: float) -> Tensor:
    """Values of pairs, with another value for those that are not computed."""
    return x_TB if computed_TB is None else torch.where(computed_TB, x_TB, value)


def counted_images(rows: Iterable[Row]) -> Tensor | None:
    """True for the images [R, B] that have the loss of a row; None: all."""
    masks = [(row.counted_B, row.target.features.cls_BC) for row in rows]
    if all(counted_B is None for counted_B, _ in masks):
        return None
    return torch.stack(
        [
            torch.ones_like(cls_BC[:, 0], dtype=torch.bool) if counted_B is None else counted_B
            for counted_B, cls_BC in masks
        ]
    )


def mean_gaps(found: Distilled, counted_EB: Tensor | None) -> Tensor:
    """Distances per entry, means over its counted images; NaN if it has none. No host read."""
    if counted_EB is None:
        return found.gap_T22
    counted_EB11 = counted_EB[:, :, None, None]
    return torch.where(counted_EB11, found.gap_TB22, 0.0).sum(1) / counted_EB11.sum(1)


def metrics(
    rows: Mapping[str, Sequence[Row]], found: Distilled, image_TB: Tensor, gap_R22: Tensor
) -> dict[str, Tensor]:
    """Logged values of a micro batch, keyed `loss` and `{teacher}/{name}`.

    `loss_share` is a teacher's share of the loss as weighed, so of what is kept after dropping;
    `image_loss` is the loss of each image [B], before it is weighed. Distances are means over the
    images that a teacher has computed and whose loss has the kind of token (NaN without one);
    images that it has not computed have no `image_loss`: NaN.
    """
    values = {"loss": found.loss.detach()}
    kept_T, weight_T = (found.weight_TB > 0).float().mean(1), found.weight_TB.sum(1)
    loss_TB = found.loss_TB.detach()
    share_T = (loss_TB * found.weight_TB).sum(1) / values["loss"]
    gaps = gap_R22.split([len(group) for group in rows.values()])
    for t, (name, group) in enumerate(rows.items()):
        for row, gap_22 in zip(group, gaps[t].unbind(), strict=True):
            for kind in row.distance.kinds:
                gap_2 = gap_22[KINDS.index(kind)]
                values |= {f"{name}/{kind}_cosine": gap_2[0], f"{name}/{kind}_smooth_l1": gap_2[1]}
        values |= {f"{name}/kept": kept_T[t], f"{name}/weight": weight_T[t]}
        values |= {f"{name}/loss_share": share_T[t], f"{name}/image_loss": image_TB[t]}
    return values
