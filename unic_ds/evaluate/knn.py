"""Weighted k nearest neighbours under the cosine (arXiv 1805.01978, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**26
"""Cosines that are held at once, and votes: 256 MB each."""


def knn(
    train_NC: Tensor,
    train_label_N: Tensor,
    val_NC: Tensor,
    val_label_N: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
    block: int = BLOCK,
) -> Iterator[tuple[str, float]]:
    """Yield ("knn", accuracy in %): the k nearest training rows vote by exp(cosine / temperature).

    Exact, on the tensors' device, in blocks of validation rows with at most `block` cosines and
    votes. Fewer training rows than k all vote. Of classes with equal votes the smallest label wins;
    which of equally near rows is the k-th is left to torch.topk.
    """
    k = min(k, len(train_NC))
    train_NC, val_NC = F.normalize(train_NC.float()), F.normalize(val_NC.float())
    class_L, place_N = train_label_N.unique(return_inverse=True)
    place_L = torch.arange(len(class_L), device=class_L.device)
    rows = max(1, block // max(len(train_NC), k * len(class_L)))
    hits = torch.zeros((), dtype=torch.long, device=val_NC.device)
    for row_QC, label_Q in zip(val_NC.split(rows), val_label_N.split(rows), strict=True):
        cosine_QK, near_QK = (row_QC @ train_NC.T).topk(k)
        # Relative to the nearest: the same vote, which at a small T neither overflows nor vanishes.
        weight_QK = ((cosine_QK - cosine_QK[:, :1]) / temperature).exp()
        # A product, not scatter_add, whose order of summation changes on a GPU.
        chosen_QKL = (place_N[near_QK][..., None] == place_L).float()
        vote_QL = torch.einsum("qk,qkl->ql", weight_QK, chosen_QKL)
        hits += (class_L[vote_QL.argmax(1)] == label_Q).sum()
    yield "knn", 100 * int(hits) / len(val_NC)
