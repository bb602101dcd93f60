"""Angular dispersion of each teacher's CLS targets, by which the term `dispersion` divides.

    E[angle(y, mean of y / |y|)^2]        over the images of all steps so far

(Ranzinger et al., C-RADIOv4, arXiv 2601.17237). Sums over images do not depend on how a batch is
split over ranks and micro batches. An angle is taken to the mean direction of the steps before: the
teachers are frozen, so the first, rough means lose their weight.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds import config, dist
from unic_ds.losses.terms import angle


class Dispersion(nn.Module):
    """Running dispersion of one teacher with `width` channels."""

    direction_C: Tensor
    square_2: Tensor
    pending_C: Tensor
    pending_2: Tensor

    def __init__(self, width: int):
        super().__init__()
        zero_C, zero_2 = torch.zeros(width).double(), torch.zeros(2).double()
        self.register_buffer("direction_C", zero_C)  # sum of unit targets
        self.register_buffer("square_2", zero_2)  # sum of squared angles, and their number
        # Sums since the last `track`; empty at every checkpoint.
        self.register_buffer("pending_C", zero_C.clone(), persistent=False)
        self.register_buffer("pending_2", zero_2.clone(), persistent=False)

    @torch.no_grad()
    def forward(self, target_BC: Tensor) -> Tensor:
        """Dispersion before this step, 1 as long as none is known; add a micro batch's targets."""
        square_B = angle(target_BC, self.direction_C.float()).square().double()
        known_B = self.direction_C.any().expand_as(square_B)
        self.pending_C += F.normalize(target_BC, dim=-1).double().sum(0)
        self.pending_2 += torch.stack([torch.where(known_B, square_B, 0.0), known_B]).sum(1)
        total, count = self.square_2
        return torch.where(total > 0, total / count, 1.0).float()

    @torch.no_grad()
    def track(self, taken: Tensor) -> None:
        """Add the targets of an optimiser step on all ranks, unless `taken` is false."""
        sums = dist.all_gather(torch.cat([self.pending_C, self.pending_2])).sum(0)
        usable = sums.isfinite().all() & taken
        sums = torch.where(usable, sums, 0.0)
        self.direction_C += sums[:-2]
        self.square_2 += sums[-2:]
        self.pending_C.zero_()
        self.pending_2.zero_()


class Dispersions(nn.Module):
    """Dispersions of the teachers whose loss has the term; its `state_dict` is checkpointed."""

    def __init__(self, widths: dict[str, int]):
        super().__init__()
        self.teachers = nn.ModuleDict({name: Dispersion(width) for name, width in widths.items()})

    def by_name(self) -> dict[str, Dispersion]:
        """The dispersions, keyed by teacher."""
        return {name: cast(Dispersion, module) for name, module in self.teachers.items()}

    def track(self, taken: Tensor) -> None:
        """Add an optimiser step, unless `taken` is false; every rank calls it."""
        for dispersion in self.by_name().values():
            dispersion.track(taken)


def build(cfg: config.Config, widths: dict[str, int]) -> Dispersions:
    """The dispersions of a run; `widths` are the teachers' channels."""
    used = [name for name, distance in cfg.distances.items() if "dispersion" in distance.cls]
    return Dispersions({name: widths[name] for name in used})
