"""Image retrieval by class: validation images are queries, training images are the gallery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.evaluator import images_used
from unic_ds.evaluate.features import Annotation, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

RECALL_AT = (1, 5, 10)
GALLERY_ROWS = 2**16
"""Gallery rows of all ranks that are gathered at once."""
BLOCK = 2**25
"""Cosines that are held at once: 128 MB, and three times as much to sort them."""
NO_LABEL = -1
REMEDY = "lower --eval.max_train"


class Labelled(NamedTuple):
    """This rank's unit features and their labels."""

    unit_RC: Tensor
    label_R: Tensor


class Retrieval:
    """Mean average precision and recall@k in %, of images of the same class."""

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `retrieval mAP` and `retrieval R@k` of each model.

        ValueError if no query has an image of its class in the gallery.
        """
        train, val = (side.labelled() for side in data.features(models))
        has_N = torch.isin(val.label_N, train.label_N)
        queries = int(has_N.sum())
        if not queries:
            raise ValueError(
                "no validation image has the class of a training image, so that nothing can be"
                " retrieved; use the same class folders in both"
            )
        rule = "cosine, queries val, gallery train"
        if queries < len(has_N):
            rule += f", {len(has_N) - queries} queries without a positive left out"
        asked_R = has_N[val.place_R]
        for model in models:
            with raised_on_all_ranks(f"the retrieval of {model.name!r}", REMEDY):
                unit_RC, val_unit_RC = (
                    F.normalize(side.cls[model.name].to(data.device)) for side in (train, val)
                )
                gallery = Labelled(unit_RC, train.label_R.to(data.device))
                asked = Labelled(val_unit_RC[asked_R], val.label_R[asked_R].to(data.device))
            precision, recalls = retrieve(gallery, asked)
            used = f"{rule}, {images_used(len(train.label_N), queries, model)}"
            yield Score(model.name, "retrieval mAP", precision, f"retrieval mAP {used}")
            for k, recall in zip(RECALL_AT, recalls, strict=True):
                how = f"retrieval R@{k}: a positive among the {k} nearest, {used}"
                yield Score(model.name, f"retrieval R@{k}", recall, how)


@torch.inference_mode()
def retrieve(
    gallery: Labelled, query: Labelled, *, block: int = BLOCK
) -> tuple[float, list[float]]:
    """Mean average precision and recall at `RECALL_AT` of all ranks' queries, in %.

    Recall@k is the share of queries with a positive among the k nearest (arXiv 1511.06452). Equally
    near images have one rank, the last of theirs, as in scikit-learn's `average_precision_score`:
    constant features have the precision of chance. Every query needs a positive. Exact; about
    `block` cosines are held at once. Every rank calls it.
    """
    rows, most = dist.all_gather(
        torch.tensor([len(gallery.label_R), len(query.label_R)])
    ).amax(0).tolist()  # fmt: skip
    queries = max(1, block // (rows * dist.world()))
    sums = torch.zeros(2 + len(RECALL_AT), dtype=torch.float64, device=gallery.label_R.device)
    for at in range(0, most, queries):
        part = Labelled(*(x[at : at + queries] for x in query))
        cosine_QN, label_N = cosines(gallery, part.unit_RC, rows)
        with raised_on_all_ranks("the retrieval", REMEDY):
            if len(part.label_R):
                sums += ranked(cosine_QN, part.label_R[:, None] == label_N)
    count, precision, *recalls = (100 * dist.all_reduce_sum(sums)).tolist()
    count /= 100
    return precision / count, [recall / count for recall in recalls]


def cosines(gallery: Labelled, query_QC: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Cosines (Q, N) of this rank's queries and all ranks' galleries, and the labels (N).

    No rank's gallery has more than `rows` rows; shorter ones are filled up by NO_LABEL, which is
    farther than all others.
    """
    if dist.world() == 1:
        with raised_on_all_ranks("the retrieval", REMEDY):
            return query_QC @ gallery.unit_RC.T, gallery.label_R
    parts, labels = [], []
    step = max(1, GALLERY_ROWS // dist.world())
    for at in range(0, rows, step):
        with raised_on_all_ranks("the retrieval", REMEDY):
            unit_RC, label_R = (x[at : at + step] for x in gallery)
            missing = min(step, rows - at) - len(label_R)
            unit_RC = F.pad(unit_RC, (0, 0, 0, missing))
            label_R = F.pad(label_R, (0, missing), value=NO_LABEL)
        unit_NC, label_N = (dist.all_gather(x).flatten(0, 1) for x in (unit_RC, label_R))
        with raised_on_all_ranks("the retrieval", REMEDY):
            cosine_QN = query_QC @ unit_NC.T
            parts.append(cosine_QN.masked_fill_(label_N == NO_LABEL, -torch.inf))
            labels.append(label_N)
    return torch.cat(parts, 1), torch.cat(labels)


def ranked(cosine_QN: Tensor, positive_QN: Tensor) -> Tensor:
    """Number of queries, sums of average precisions and of hits at `RECALL_AT` (2 + K), fp64."""
    count_Q = positive_QN.sum(1)
    # Ascending cosines of the positives of each query, behind -inf if it has fewer than others.
    found_QP = cosine_QN.masked_fill(~positive_QN, -torch.inf)
    found_QP = found_QP.topk(int(count_Q.max()), dim=1).values.flip(1).contiguous()
    all_QN = cosine_QN.sort(1).values
    # Images, and positives, that are at least as near as each positive.
    near_QP = all_QN.shape[1] - torch.searchsorted(all_QN, found_QP)
    hit_QP = found_QP.shape[1] - torch.searchsorted(found_QP, found_QP)
    precision_QP = (hit_QP.double() / near_QP).masked_fill(found_QP == -torch.inf, 0)
    place_Q = near_QP[:, -1] - hit_QP[:, -1] + 1  # of the nearest positive behind its equals
    sums = [place_Q.new_tensor(len(place_Q)), (precision_QP.sum(1) / count_Q).sum()]
    return torch.stack([*sums, *((place_Q <= k).sum() for k in RECALL_AT)]).double()
