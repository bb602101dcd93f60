"""Multiple-gradient descent: the teachers' gradients at the student's last features, and weights.

With g_t the gradient of teacher t's loss at the tokens of the student's last block, the weights

    min_w |sum_t w_t g_t|^2 = min_w w^T G w        G_ts = g_t . g_s,  w >= 0,  sum_t w_t = 1

give a direction in which no teacher's loss rises, or the zero vector if there is none (Sener and
Koltun, MGDA-UB, NeurIPS 2018, arXiv 1810.04650). Gradients stop at these tokens: the encoder is not
run backward. The ladder is, once for each teacher, which together cost one backward of it: its op
computes nothing for teachers without a gradient.

F faces of the simplex of T teachers, M numbers of the features of all images; the rest as in
`tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from unic_ds import config, dist
from unic_ds.losses.balancer import Balancer, teacher_weights
from unic_ds.tokens import Shared, Tokens

RIDGE = 1e-6
"""Part of the mean squared gradient that is added to the diagonal, above the rounding of products
in fp32: equal gradients share evenly, however a batch is split."""


class Mgda(Balancer):
    """Weights of the shortest convex combination of the teachers' gradients.

    They come from the running inner products of the steps before: those of a step are complete when
    all its micro batches have run, and a sum over images does not depend on how they are split.
    """

    compares_gradients = True

    gram_TT: Tensor
    share_T: Tensor
    sum_TT: Tensor
    images: Tensor

    def __init__(self, weight_T: Tensor, momentum: float):
        super().__init__(weight_T)
        self.momentum = momentum
        zero_TT = torch.zeros(len(weight_T), len(weight_T), dtype=torch.float64)
        self.register_buffer("gram_TT", zero_TT)  # 0: before the first step
        self.register_buffer("share_T", torch.ones_like(weight_T))
        # Sums since the last `track`; empty at every checkpoint.
        self.register_buffer("sum_TT", zero_TT.clone(), persistent=False)
        self.register_buffer("images", zero_TT.new_zeros(1), persistent=False)

    @classmethod
    def from_config(cls, cfg: config.Config) -> Self:
        return cls(teacher_weights(cfg), cfg.balance.momentum)

    def share(self, loss_TB: Tensor, uniform_TB: Tensor) -> Tensor:
        return (self.share_T / loss_TB.numel())[:, None].expand_as(loss_TB)

    def compare(self, gram_TT: Tensor, images: int) -> None:
        self.sum_TT += gram_TT
        self.images += images

    @torch.no_grad()
    def track(self, taken: Tensor | None = None) -> None:
        local = torch.cat([self.sum_TT.flatten(), self.images])
        total = dist.all_gather(local).sum(0)
        mean_TT = (total[:-1] / total[-1].clamp(min=1)).view_as(self.gram_TT)
        moved_TT = self.momentum * self.gram_TT + (1 - self.momentum) * mean_TT
        moved_TT = torch.where(self.gram_TT.any(), moved_TT, mean_TT)
        usable = moved_TT.isfinite().all()
        usable = usable if taken is None else usable & taken
        self.gram_TT.copy_(torch.where(usable, moved_TT, self.gram_TT))
        share_T = len(self.gram_TT) * min_norm(self.gram_TT)
        self.share_T.copy_(torch.where(usable, share_T.float(), self.share_T))
        self.sum_TT.zero_()
        self.images.zero_()


def gram(loss_TB: Tensor, pred: Mapping[str, Tokens], shared: Shared) -> Tensor:
    """Inner products [T, T] of the teachers' gradients at the shared features, in fp64.

    They are summed over the images. The losses are those of `pred`, copies of `shared.pred`.
    """
    grads = [
        feature_grads(loss_B.sum(), copied, made, shared.features)
        for loss_B, copied, made in zip(
            loss_TB.unbind(), pred.values(), shared.pred.values(), strict=True
        )
    ]
    total_TT = loss_TB.new_zeros(len(grads), len(grads), dtype=torch.float64)
    for of_teachers in zip(*grads, strict=True):
        grad_TM = torch.stack([grad.flatten() for grad in of_teachers]).float()
        total_TT += grad_TM @ grad_TM.T
    return total_TT


def feature_grads(
    loss: Tensor, copied: Tokens, made: Tokens, features: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradient of one teacher's loss at each of the features, through its predictions.

    The loss is a function of `copied`, which is copied from `made`, which is made of the features.
    The step between the two is left out: it has the hooks of DeepSpeed's engine, which count
    backward passes.
    """
    pairs = [pair for pair in zip(copied, made, strict=True) if pair[1].requires_grad]
    heads, ladder = zip(*pairs, strict=True)
    grads = torch.autograd.grad(loss, heads, retain_graph=True, materialize_grads=True)
    return torch.autograd.grad(ladder, features, grads, retain_graph=True, materialize_grads=True)


def min_norm(gram_TT: Tensor, ridge: float = RIDGE) -> Tensor:
    """Weights [T] >= 0, of sum 1, that minimise w^T G w; exact, without a host read.

    On the face of teachers f whose minimum is inside, w is proportional to the solution x of
    G_ff x = 1. All 2^T - 1 faces are solved, and the least norm of those with x >= 0 is the answer.
    """
    face_FT = faces(len(gram_TT), gram_TT.device)
    mean = gram_TT.diagonal().mean()
    one_TT = torch.eye(len(gram_TT), dtype=gram_TT.dtype, device=gram_TT.device)
    gram_TT = gram_TT + torch.where(mean > 0, ridge * mean, 1.0) * one_TT
    system_FTT = torch.where(face_FT[:, :, None] & face_FT[:, None], gram_TT, one_TT)
    x_FT = torch.linalg.solve_ex(system_FTT, face_FT.to(gram_TT)).result
    weight_FT = x_FT / x_FT.sum(1, keepdim=True)
    norm_F = ((weight_FT @ gram_TT) * weight_FT).sum(1)
    inside_F = (weight_FT >= 0).all(1) & norm_F.isfinite()
    best_1 = torch.where(inside_F, norm_F, torch.inf).argmin(0, keepdim=True)
    return weight_FT.index_select(0, best_1)[0]


def faces(teachers: int, device: torch.device) -> Tensor:
    """True for the teachers [T] of each of the faces of a simplex, bool [2^T - 1, T]."""
    number_F1 = torch.arange(1, 2**teachers, device=device)[:, None]
    return (number_F1 >> torch.arange(teachers, device=device)) % 2 == 1
