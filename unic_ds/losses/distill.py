"""The distillation loss: distances between predictions and targets per (teacher, image), balanced.

Per token a weighted sum of terms (method: section 3): cosine `1 - cos`, smooth_l1 (beta 1), mse,
and for CLS tokens contrastive: InfoNCE of an image's prediction against the targets of all images
(Tian et al., CRD, arXiv 1910.10699, with the batch as negatives). Per teacher and image the mean of
the CLS loss and the mean patch loss. All terms of a token on its own are one op of `unic_kernels`;
what other images decide is added here. Tensors in, tensors out, no host read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config
from unic_ds.losses.balance import Balancer
from unic_ds.ops import FUSED, Ops
from unic_ds.tokens import KINDS, Target, Tokens
from unic_kernels.distill_loss import Distilled

AllGather = Callable[[Tensor], tuple[Tensor, int]]
"""CLS targets of this rank -> those of all ranks in rank order, and where this rank's begin."""


def alone(target_BC: Tensor) -> tuple[Tensor, int]:
    """`Everyone` of a process that has no others."""
    return target_BC, 0


class Row(NamedTuple):
    """One teacher's prediction and target, and what judges them."""

    pred: Tokens
    target: Target
    distance: config.Distance

    def rungs(self) -> list[Tokens]:
        """Predictions to be judged each on its own: those along a leading rung axis, or the one."""
        kind = 0 if self.distance.cls else 1
        if self.pred[kind].dim() == self.target.raw[kind].dim():
            return [self.pred]
        count, pairs = len(self.pred[kind]), zip(self.pred, self.distance, strict=True)
        sides = [x if terms else [x] * count for x, terms in pairs]
        return [Tokens(*pair) for pair in zip(*sides, strict=True)]

    def terms(self) -> tuple[dict[str, float], dict[str, float]]:
        """Weights of the terms that a token's own target decides; a kind that is learned has one.

        A kind that only contrast judges is still looked at, for the log.
        """
        cls = {term: weight for term, weight in self.distance.cls.items() if term != "contrastive"}
        return cls or ({"cosine": 0.0} if self.distance.cls else {}), self.distance.patch

    def contrast(self, temperature: float, everyone: AllGather) -> Tensor | None:
        """The contrastive share of the loss per image (B), where there is one."""
        if "contrastive" not in self.distance.cls:
            return None
        gap_B = contrastive(self.pred.cls_BC.float(), self.target.kind(0), temperature, everyone)
        gap_B = gap_B if gap_B.dim() == 1 else gap_B.mean(0)
        return self.distance.cls["contrastive"] / len(self.distance.kinds) * gap_B


def contrastive(
    pred_BC: Tensor, target_BC: Tensor, temperature: float, everyone: AllGather
) -> Tensor:
    """InfoNCE per image: -log softmax over all images' targets of cos / temperature.

    `pred_BC` may have leading axes. Negatives are the images that ran together: this micro batch's
    on every rank.
    """
    all_NC, first = everyone(target_BC)
    logits_BN = F.normalize(pred_BC, dim=-1) @ F.normalize(all_NC, dim=-1).T / temperature
    own_BB = logits_BN.log_softmax(-1)[..., first : first + len(target_BC)]
    return -own_BB.diagonal(dim1=-2, dim2=-1)


def mean_of_rungs(x_E: Tensor, counts: Sequence[int]) -> Tensor:
    """Means over neighbours along the first axis, `counts` of them for each teacher."""
    if len(counts) == len(x_E):
        return x_E
    return torch.stack([part.mean(0) for part in x_E.split(list(counts))])


def distill_loss(
    pred: Mapping[str, Tokens],
    target: Mapping[str, Target],
    uniform_TB: Tensor,
    *,
    loss: config.Loss,
    balance: Balancer,
    distances: Mapping[str, config.Distance] | None = None,
    everyone: AllGather = alone,
    ops: Ops = FUSED,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro batch and its metrics, detached on the device.

    `pred` and `target` are keyed by teacher in config order; `uniform_TB` decides the dropping;
    `distances` are those of teachers that differ from `loss`. The loss is a mean over the micro
    batch's images: average it over ranks and accumulation. A leading rung axis in `pred` is
    averaged: `ladder.combine = each` judges every rung on its own.
    """
    rows = {
        name: Row(tokens, target[name], (distances or {}).get(name, loss.distance))
        for name, tokens in pred.items()
    }
    rungs = [row.rungs() for row in rows.values()]
    counts = [len(own) for own in rungs]
    each = [row for row, own in zip(rows.values(), rungs, strict=True) for _ in own]

    def refine(loss_EB: Tensor) -> Tensor:
        loss_TB = mean_of_rungs(loss_EB, counts)
        gaps = [row.contrast(loss.temperature, everyone) for row in rows.values()]
        if all(gap_B is None for gap_B in gaps):
            return loss_TB
        none_B = torch.zeros_like(loss_TB[0])
        return loss_TB + torch.stack([none_B if gap_B is None else gap_B for gap_B in gaps])

    found = ops.distill_loss(
        [tokens for own in rungs for tokens in own],
        [row.target.raw for row in each],
        [row.target.mean_2C for row in each],
        [row.target.divisor_2C for row in each],
        uniform_TB,
        distances=[row.terms() for row in each],
        balance=balance,
        refine=refine,
        clamp=each[0].target.clamp,
        eps=0.0,  # the divisor has it
    )
    return found.loss, metrics(rows, found, mean_of_rungs(found.gap_T22, counts))


def metrics(rows: Mapping[str, Row], found: Distilled, gap_T22: Tensor) -> dict[str, Tensor]:
    """What the log shows of a micro batch, by `{teacher}/{name}`."""
    said = {"loss": found.loss.detach()}
    kept_T, weight_T = (found.weight_TB > 0).float().mean(1), found.weight_TB.sum(1)
    for t, (name, row) in enumerate(rows.items()):
        for kind in row.distance.kinds:
            gap_2 = gap_T22[t, KINDS.index(kind)]
            said |= {f"{name}/{kind}_cosine": gap_2[0], f"{name}/{kind}_smooth_l1": gap_2[1]}
        said |= {f"{name}/kept": kept_T[t], f"{name}/weight": weight_T[t]}
    return said
