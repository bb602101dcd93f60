"""Weighted k nearest neighbours under the cosine (arXiv 1805.01978, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.evaluate.evaluator import images_used
from unic_ds.evaluate.features import Annotation, EvalData, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.table import Score

BANK_ROWS = 2**16
"""Training rows of all ranks that are on the device at once; narrower blocks are slower."""
BLOCK = 2**26
"""Cosines that are held at once, and votes: 256 and 512 MB."""
ONE_VOTE = 2**40
"""Votes are counted in integers, whose sum does not depend on the order."""
NO_LABEL = -1


class Rows(NamedTuple):
    """This rank's rows of a labelled set."""

    feature_RC: Tensor
    label_R: Tensor


class Neighbours(NamedTuple):
    """The nearest training rows of each query, nearest first."""

    cosine_QK: Tensor
    label_QK: Tensor


class KNN:
    """kNN accuracy in %: options `eval.k` and `eval.temperature`."""

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `knn` of each model."""
        train, val = (side.labelled() for side in data.features(models))
        for model in models:
            with raised_on_all_ranks(f"the kNN of {model.name!r}", "lower --eval.max_train"):
                bank, query = (
                    Rows(side.cls[model.name].to(data.device), side.label_R.to(data.device))
                    for side in (train, val)
                )
            value = knn_accuracy(bank, query, k=data.k, temperature=data.temperature)
            used = images_used(len(train.label_N), len(val.label_N), model)
            rule = f"knn k={data.k} T={data.temperature:g} cosine"
            yield Score(model.name, "knn", value, f"{rule} {used}")


@torch.inference_mode()
def knn_accuracy(
    bank: Rows, query: Rows, *, k: int, temperature: float, block: int = BLOCK
) -> float:
    """Accuracy in %: the k nearest training rows vote by exp(cosine / temperature).

    `bank` and `query` are this rank's training and validation rows, on its device; each query is
    answered on its own rank, past which the bank goes in blocks. Exact. At most `block` cosines are
    held at once. Fewer training rows than k all vote. Of classes with equal votes the smallest
    label wins; which of equally near rows is the k-th is left to torch.topk. Every rank calls it.
    """
    found = nearest(bank, query.feature_RC, k=k, block=block)
    hits = torch.zeros(2, dtype=torch.int64, device=query.label_R.device)
    with raised_on_all_ranks("the kNN's votes", "lower --eval.k"):
        hits[0] = (vote(found, temperature, block) == query.label_R).sum()
        hits[1] = len(query.label_R)
    right, count = dist.all_reduce_sum(hits).tolist()
    return 100 * right / count


def nearest(bank: Rows, query_QC: Tensor, *, k: int, block: int) -> Neighbours:
    """The k nearest rows of all ranks' banks, or all of them if they are fewer."""
    shares = dist.all_gather(torch.tensor(len(bank.label_R))).tolist()
    rows = max(1, min(max(shares), BANK_ROWS // dist.world(), block // dist.world()))
    with raised_on_all_ranks("the kNN", "lower --eval.max_train"):
        bank_RC, query_QC = F.normalize(bank.feature_RC.float()), F.normalize(query_QC.float())
        best = Neighbours(query_QC[:, :0], bank.label_R.new_empty(len(query_QC), 0))
    for at in range(0, max(shares), rows):
        with raised_on_all_ranks("the kNN", "lower --eval.max_train"):
            part = Rows(bank_RC[at : at + rows], bank.label_R[at : at + rows])
        part = gathered(part, rows)
        with raised_on_all_ranks("the kNN", "lower --eval.max_train"):
            best = merged(best, part, query_QC, k, block)
    return best


def gathered(part: Rows, rows: int) -> Rows:
    """A block of all ranks' rows in the order in which they were dealt; short ones are filled."""
    if dist.world() == 1:
        return part
    missing = rows - len(part.label_R)
    feature_WRC = dist.all_gather(F.pad(part.feature_RC, (0, 0, 0, missing)))
    label_WR = dist.all_gather(F.pad(part.label_R, (0, missing), value=NO_LABEL))
    feature_NC, label_N = feature_WRC.transpose(0, 1).flatten(0, 1), label_WR.T.flatten()
    real_N = label_N != NO_LABEL
    return Rows(feature_NC[real_N], label_N[real_N])


def merged(best: Neighbours, part: Rows, query_QC: Tensor, k: int, block: int) -> Neighbours:
    """The nearest of those found before and of another block of the bank."""
    queries = max(1, block // max(len(part.label_R), k))
    chunks = []
    parts = (x.split(queries) for x in (query_QC, *best))
    for row_QC, *old in zip(*parts, strict=True):
        cosine_QK, near_QK = (row_QC @ part.feature_RC.T).topk(min(k, len(part.label_R)))
        found = Neighbours(cosine_QK, part.label_R[near_QK])
        if old[0].shape[1]:
            cosine_QK, label_QK = (torch.cat(pair, 1) for pair in zip(old, found, strict=True))
            cosine_QK, near_QK = cosine_QK.topk(min(k, cosine_QK.shape[1]))
            found = Neighbours(cosine_QK, label_QK.gather(1, near_QK))
        chunks.append(found)
    return Neighbours(*map(torch.cat, zip(*chunks, strict=True)))


def vote(found: Neighbours, temperature: float, block: int) -> Tensor:
    """The label (Q) with most votes of each query's neighbours."""
    if not len(found.label_QK):
        return found.label_QK.flatten()
    label_L, class_QK = found.label_QK.unique(return_inverse=True)
    # Relative to the nearest: the same vote, which at a small T neither overflows nor vanishes.
    weight_QK = ((found.cosine_QK - found.cosine_QK[:, :1]) / temperature).exp()
    weight_QK = (weight_QK.double() * ONE_VOTE).round().long()
    chosen = []
    queries = max(1, block // len(label_L))
    for class_q, weight_q in zip(class_QK.split(queries), weight_QK.split(queries), strict=True):
        vote_QL = weight_q.new_zeros(len(class_q), len(label_L)).scatter_add_(1, class_q, weight_q)
        chosen.append(label_L[vote_QL.argmax(1)])
    return torch.cat(chosen)
