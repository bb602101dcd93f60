"""RankMe: the effective rank of CLS features, which needs no labels (arXiv 2210.02885)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unic_ds import dist
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

EPSILON = 1e-7
"""Added to each share of the singular values (equation 1)."""
REMEDY = "lower --eval.max_train"


class RankMe:
    """Effective rank of the training images' features.

    It is a diagnosis, by which models are not ranked: it is at most the number of channels, which
    differs between models.
    """

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset()

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `rankme` of each model."""
        train = data.features_of(models, "train")
        for model in models:
            x_RC = train.cls[model.name]
            count = int(dist.all_reduce_sum(torch.tensor(len(x_RC))))
            value = effective_rank(x_RC, data.device)
            most = min(count, x_RC.shape[1])
            rule = f"rankme eps={EPSILON:g} of at most {most},"
            how = f"{rule} {count} training images {model.size} px"
            yield Score(model.name, "rankme", value, how, unit="", better="")


def effective_rank(x_RC: Tensor, device: torch.device) -> float:
    """exp of the entropy of the singular values' shares, of all ranks' features; not centred.

    From 1 for features on a line to the number of channels; every rank calls it.
    """
    count = int(dist.all_reduce_sum(torch.tensor(len(x_RC))))
    square_CC = second_moment(x_RC, torch.zeros(x_RC.shape[1], dtype=torch.float64), device)
    value = 0.0
    with raised_on_all_ranks("the effective rank", REMEDY):
        value = entropy_rank(torch.linalg.eigvalsh(square_CC).flip(0)[:count])
    return dist.broadcast_object(value)


def entropy_rank(square_C: Tensor) -> float:
    """exp of the entropy of the singular values' shares, by the squares of these values."""
    singular_C = square_C.clamp(min=0).sqrt()
    share_C = singular_C / singular_C.sum().clamp(min=torch.finfo(torch.float64).tiny)
    share_C = share_C + EPSILON
    return float((-share_C * share_C.log()).sum().exp())


def second_moment(x_RC: Tensor, origin_C: Tensor, device: torch.device) -> Tensor:
    """Sum of (x - origin)(x - origin)^T over all ranks' rows (C, C), fp64 on the device."""
    with raised_on_all_ranks("the features' second moment", REMEDY):
        origin_C = origin_C.to(device)
        square_CC = torch.zeros(len(origin_C), len(origin_C), dtype=torch.float64, device=device)
        for part_RC in x_RC.split(4096):
            part_RC = part_RC.to(device).double() - origin_C
            square_CC.addmm_(part_RC.T, part_RC)
    return dist.all_reduce_sum(square_CC)
