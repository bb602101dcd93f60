"""PHI-S standardisation: one rotation and one scale give all channels of a teacher variance 1.

    y = H U^T (x - mean) / scale        scale = sqrt(mean eigenvalue)

U holds the eigenvectors of the features' covariance and H is an orthonormal Hadamard matrix: its
entries are +-1/sqrt(C), so every channel of y has the mean of the eigenvalues as its variance
before the scale. The map is isotropic: distances are kept up to the scale, which a scale for each
channel would not do. Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free
Multi-Teacher Distillation" (arXiv 2410.01680).

Hadamard matrices come from Sylvester's doubling of Paley's two constructions (1933), which reach
the widths of the usual teachers.

A scatter matrix (sum of outer products of deviations) is accumulated in fp64 and summed over ranks,
each having moved its own to the common mean by Chan's formula: C x C numbers cross the network,
features never.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unic_ds import config
from unic_ds.teachers.standardise import EPS, Standardiser, merge
from unic_ds.tokens import Target, Tokens
from unic_kernels.ops import FUSED, Ops


def is_prime(n: int) -> bool:
    """True if n is a prime number."""
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def residues(q: int) -> Tensor:
    """Jacobsthal matrix of a prime q: 1 where i - j is a square mod q, else -1; 0 if i = j."""
    character_Q = torch.full((q,), -1.0, dtype=torch.float64)
    character_Q[torch.arange(q).square() % q] = 1
    character_Q[0] = 0
    at_Q = torch.arange(q)
    return character_Q[(at_Q[:, None] - at_Q) % q]


def bordered(q: int, sign: int) -> Tensor:
    """The Jacobsthal matrix of q with a row of ones and a column of `sign` before it."""
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, sign, residues(q)
    return border


def paley(order: int) -> Tensor | None:
    """A matrix of +-1 with orthogonal rows by one of Paley's constructions, or None."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    one, two = order - 1, order // 2 - 1
    if one % 4 == 3 and is_prime(one):
        return torch.eye(order, dtype=torch.float64) + bordered(one, -1)
    if order % 2 == 0 and two % 4 == 1 and is_prime(two):
        off = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        on = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
        eye = torch.eye(order // 2, dtype=torch.float64)
        return torch.kron(bordered(two, 1), off) + torch.kron(eye, on)
    return None


def hadamard(width: int) -> Tensor:
    """An orthonormal fp64 matrix whose entries are all +-1/sqrt(width); ValueError without one."""
    double = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    core = width // (width & -width)  # the odd part
    while core <= width:
        matrix = paley(core)
        if matrix is not None:
            while len(matrix) < width:
                matrix = torch.kron(double, matrix)
            return matrix / math.sqrt(width)
        core *= 2
    raise ValueError(
        f"no Hadamard matrix of width {width} is known here, which PHI-S needs;"
        " use --standardise.kind channel"
    )


def moved(scatter_CC: Tensor, count: Tensor, shift_C: Tensor) -> Tensor:
    """The scatter about another centre of `count` rows whose mean is `shift_C` away from it."""
    return scatter_CC + count * torch.outer(shift_C, shift_C)


def eigenvectors(scatter_CC: Tensor) -> Tensor:
    """Columns by ascending eigenvalue; of each the entry of largest magnitude is positive."""
    vector_CC = torch.linalg.eigh(scatter_CC).eigenvectors
    largest_1C = vector_CC.abs().argmax(0, keepdim=True)
    return vector_CC * vector_CC.gather(0, largest_1C).sign()


class PhiS(Standardiser):
    """Rotation and scale of one teacher with `width` channels, fitted before training.

    ValueError if there is no Hadamard matrix of that width.
    """

    basis_2CC: Tensor
    scale_2: Tensor

    def __init__(self, width: int, cfg: config.Standardise, ops: Ops = FUSED):
        super().__init__(width, cfg, ops)
        hadamard(width)  # a width without one is refused before anything runs
        self.register_buffer("basis_2CC", torch.eye(width).repeat(2, 1, 1))
        self.register_buffer("scale_2", torch.ones(2))
        self.scatter_2CC = torch.zeros(0)  # twice the bases' bytes: there only while fitting

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> Target:
        """Target of these tokens; they are rotated here, since the loss has no rotation."""
        rotated = Tokens(*(self.rotate(x_C, kind) for kind, x_C in enumerate(tokens)))
        return Target.of(rotated, self.cfg.target_clamp)

    def rotate(self, x_C: Tensor, kind: int) -> Tensor:
        """Rotate and scale the last axis of `x_C`, which may have leading axes."""
        return (x_C.float() - self.mean_2C[kind]) @ self.basis_2CC[kind].T / self.scale_2[kind]

    def undo_kind(self, y_C: Tensor, kind: int) -> Tensor:
        """Features of standardised tokens of one kind (0: cls, 1: patch)."""
        return y_C * self.scale_2[kind] @ self.basis_2CC[kind] + self.mean_2C[kind]

    @torch.no_grad()
    def observe(self, tokens: Tokens) -> None:
        """Add a micro batch of features to this rank's statistics."""
        before_S2C = self.moments()
        super().observe(tokens)
        _, mean_2C, _ = self.moments_S2C
        scatter_2CC = self.scatter(before_S2C, mean_2C)
        for kind, x_NC in enumerate((tokens.cls_BC, tokens.patch_BNC.flatten(0, 1))):
            rest_NC = x_NC.double() - mean_2C[kind]
            scatter_2CC[kind] += rest_NC.T @ rest_NC
        self.scatter_2CC = scatter_2CC

    def scatter(self, moments_S2C: Tensor, centre_2C: Tensor) -> Tensor:
        """This rank's scatter [2, C, C] about a centre; the moments are of what it has observed."""
        if not len(self.scatter_2CC):
            return torch.zeros_like(self.basis_2CC, dtype=torch.float64)
        count_2C, mean_2C, _ = moments_S2C
        kinds = zip(self.scatter_2CC, count_2C[:, 0], mean_2C - centre_2C, strict=True)
        return torch.stack([moved(*kind) for kind in kinds])

    @torch.no_grad()
    def fit(self, moments_PS2C: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Fix mean, rotation and scale by the moments of all ranks; `total` sums over the ranks.

        ValueError if the features are not finite, or those of one kind are all the same.
        """
        ours_S2C = self.moments()
        super().fit(moments_PS2C, total)
        count_2C, mean_2C, _ = merge(moments_PS2C)
        scatter_2CC = total(self.scatter(ours_S2C, mean_2C))
        hadamard_CC = hadamard(len(scatter_2CC[0])).to(scatter_2CC)
        for kind, word in enumerate(("cls", "patch")):
            freedom = (count_2C[kind, 0] - 1).clamp(min=1)
            scale = (scatter_2CC[kind].trace() / freedom / len(hadamard_CC)).sqrt()
            if not scale > EPS:
                raise ValueError(
                    f"its {word} tokens are all the same in the fitted batches; give another"
                    " teacher, or more --standardise.fit_steps"
                )
            self.basis_2CC[kind] = hadamard_CC @ eigenvectors(scatter_2CC[kind]).T
            self.scale_2[kind] = scale
        self.scatter_2CC = torch.zeros(0)
