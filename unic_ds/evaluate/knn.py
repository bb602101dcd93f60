"""k nearest neighbours (arXiv 1805.01978, section 3.4), with the votes of several papers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.evaluator import images_used
from unic_ds.evaluate.features import Annotation, Model, ModelOutput
from unic_ds.evaluate.products import block_on, product
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

BANK_ROWS = 2**14
"""Training rows of all ranks that are compared at once; narrower blocks are slower."""
BLOCK = 2**26
"""Similarities that are held at once, and votes: 256 and 512 MB; on a CPU `block_on` is less."""
ONE_VOTE = 2**40
"""Votes are counted in integers, whose sum does not depend on the order."""
NO_LABEL = -1

Votes = Literal["weighted", "majority"]
Distance = Literal["cosine", "l2"]


class Rows(NamedTuple):
    """This rank's rows of a labelled set."""

    feature_RC: Tensor
    label_R: Tensor


class Neighbours(NamedTuple):
    """The nearest training rows of each query, nearest first; of equals the earlier place."""

    near_QK: Tensor
    """Cosine, or minus the squared distance."""
    label_QK: Tensor


class KNN:
    """kNN accuracy in %: options `eval.protocol`, `eval.k` and `eval.temperature`."""

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `knn` of each model; `knn k=K` for each of several numbers of neighbours."""
        train, val = (side.labelled() for side in data.features(models))
        options, rules = data.options, data.options.rules
        weight = f"T={options.temperature:g}" if rules.votes == "weighted" else rules.votes
        for model in models:
            with raised_on_all_ranks(f"the kNN of {model.name!r}", "lower --eval.max_train"):
                bank, query = (
                    Rows(side.cls[model.name].to(data.device), side.label_R.to(data.device))
                    for side in (train, val)
                )
            used = images_used(len(train.label_N), len(val.label_N), model)
            found = knn_accuracies(
                bank,
                query,
                ks=options.neighbours,
                temperature=options.temperature,
                votes=rules.votes,
                distance=rules.distance,
            )
            for name, (k, value) in zip(row_names(found), found.items(), strict=True):
                yield Score(model.name, name, value, f"knn k={k} {weight} {rules.distance} {used}")


def row_names(ks: Iterable[int]) -> list[str]:
    """Names of the rows of kNN by different numbers of neighbours, in their order."""
    different = list(dict.fromkeys(ks))
    return ["knn"] if len(different) == 1 else [f"knn k={k}" for k in different]


@torch.inference_mode()
def knn_accuracies(
    bank: Rows,
    query: Rows,
    *,
    ks: Sequence[int],
    temperature: float = 1.0,
    votes: Votes = "weighted",
    distance: Distance = "cosine",
    block: int = BLOCK,
) -> dict[int, float]:
    """Accuracy in % for each number of neighbours, from one search for the most of them.

    `bank` and `query` are this rank's training and validation rows, on its device; each query is
    answered on its own rank, past which the bank goes in blocks. Exact. At most `block`
    similarities are held at once. The nearest rows vote by exp(similarity / temperature), or
    equally (`majority`). Fewer training rows than k all vote. Of equally near rows those with the
    lower place vote, and of classes with equal votes the smallest label wins. Every rank calls it.
    """
    found = nearest(bank, query.feature_RC, k=max(ks), block=block, distance=distance)
    hits = torch.zeros(len(ks) + 1, dtype=torch.int64, device=query.label_R.device)
    with raised_on_all_ranks("the kNN's votes", "lower --eval.k"):
        near_QK = found.near_QK if votes == "weighted" else torch.zeros_like(found.near_QK)
        for at, k in enumerate(ks):
            first = Neighbours(near_QK[:, :k], found.label_QK[:, :k])
            hits[at] = (vote(first, temperature, block) == query.label_R).sum()
        hits[-1] = len(query.label_R)
    *right, count = dist.all_reduce_sum(hits).tolist()
    return {k: 100 * of_k / count for k, of_k in zip(ks, right, strict=True)}


def nearest(
    bank: Rows, query_QC: Tensor, *, k: int, block: int = BLOCK, distance: Distance = "cosine"
) -> Neighbours:
    """The k nearest rows of all ranks' banks, or all of them if they are fewer."""
    shares = dist.all_gather(torch.tensor(len(bank.label_R))).tolist()
    rows = max(1, min(max(shares), BANK_ROWS // dist.world(), block // dist.world()))
    bank_RC, query_QC = comparable(bank.feature_RC, query_QC, distance)
    best = Neighbours(query_QC[:, :0], bank.label_R.new_empty(len(query_QC), 0))
    for at in range(0, max(shares), rows):
        with raised_on_all_ranks("the kNN", "lower --eval.max_train"):
            part = Rows(bank_RC[at : at + rows], bank.label_R[at : at + rows])
        part = gathered(part, rows)
        with raised_on_all_ranks("the kNN", "lower --eval.max_train"):
            best = merged(best, part, query_QC, k, block, distance)
    if distance == "l2":
        best = best._replace(near_QK=best.near_QK - query_QC.square().sum(1, keepdim=True))
    return best


def comparable(bank_RC: Tensor, query_QC: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """fp32 features of unit length; for the distance those less the mean of all ranks' banks.

    The mean does not change distances, but would cost digits of their squares.
    """
    with raised_on_all_ranks("the kNN", "lower --eval.max_train"):
        bank_RC, query_QC = bank_RC.float(), query_QC.float()
        if distance == "cosine":
            bank_RC, query_QC = F.normalize(bank_RC), F.normalize(query_QC)
        else:
            sum_C = F.pad(bank_RC.sum(0).double(), (0, 1), value=len(bank_RC))
    if distance == "cosine":
        return bank_RC, query_QC
    sum_C = dist.all_reduce_sum(sum_C)
    mean_C = (sum_C[:-1] / sum_C[-1]).float()
    with raised_on_all_ranks("the kNN", "lower --eval.max_train"):
        return bank_RC - mean_C, query_QC - mean_C


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


def merged(
    best: Neighbours, part: Rows, query_QC: Tensor, k: int, block: int, distance: Distance
) -> Neighbours:
    """The nearest of those found before and of another block of the bank, whose places follow.

    For the distance, minus its square without the query's own.
    """
    block = block_on(query_QC.device, block)
    queries = max(1, block // max(len(part.label_R), k))
    bias_R = None
    if distance == "l2":
        bias_R, query_QC = -part.feature_RC.square().sum(1), 2 * query_QC
    chunks = []
    parts = (x.split(queries) for x in (query_QC, *best))
    for row_QC, *old in zip(*parts, strict=True):
        near_QK, at_QK = largest(product(row_QC, part.feature_RC, bias_R), k)
        found = Neighbours(near_QK, part.label_R[at_QK])
        if old[0].shape[1]:
            near_QK, label_QK = (torch.cat(pair, 1) for pair in zip(old, found, strict=True))
            near_QK, at_QK = largest(near_QK, k)
            found = Neighbours(near_QK, label_QK.gather(1, at_QK))
        chunks.append(found)
    return Neighbours(*map(torch.cat, zip(*chunks, strict=True)))


def largest(value_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their columns, largest first; of equals the left ones.

    torch.topk leaves open which of equals it finds.
    """
    top_QK, at_QK = value_QN.topk(min(k + 1, value_QN.shape[1]))
    if top_QK.shape[1] > k:
        tied_Q = top_QK[:, k] == top_QK[:, k - 1]
        at_QK = at_QK[:, :k]
        if tied_Q.any():
            at_QK[tied_Q] = leftmost(value_QN[tied_Q], top_QK[tied_Q, k - 1], k)
    at_QK = at_QK.sort(1).values
    top_QK, order_QK = value_QN.gather(1, at_QK).sort(dim=1, descending=True, stable=True)
    return top_QK, at_QK.gather(1, order_QK)


def leftmost(value_QN: Tensor, least_Q: Tensor, k: int) -> Tensor:
    """Columns (Q, k) of the values above the k-th largest, and of the first that equal it."""
    more_QN, equal_QN = value_QN > least_Q[:, None], value_QN == least_Q[:, None]
    left_Q1 = k - more_QN.sum(1, keepdim=True)
    chosen_QN = more_QN | (equal_QN & (equal_QN.cumsum(1, dtype=torch.int32) <= left_Q1))
    return chosen_QN.nonzero()[:, 1].view(-1, k)


def vote(found: Neighbours, temperature: float, block: int) -> Tensor:
    """The label (Q) with most votes of each query's neighbours."""
    if not len(found.label_QK):
        return found.label_QK.flatten()
    label_L, class_QK = found.label_QK.unique(return_inverse=True)
    # Relative to the nearest: the same vote, which at a small T neither overflows nor vanishes.
    weight_QK = ((found.near_QK - found.near_QK[:, :1]) / temperature).exp()
    weight_QK = (weight_QK.double() * ONE_VOTE).round().long()
    chosen = []
    queries = max(1, block_on(class_QK.device, block) // len(label_L))
    for class_q, weight_q in zip(class_QK.split(queries), weight_QK.split(queries), strict=True):
        vote_QL = weight_q.new_zeros(len(class_q), len(label_L)).scatter_add_(1, class_q, weight_q)
        chosen.append(label_L[vote_QL.argmax(1)])
    return torch.cat(chosen)
