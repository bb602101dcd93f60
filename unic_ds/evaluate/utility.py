"""Linear probe of a model with fewer weights or feature channels (figure 6 of arXiv 2408.05088).

A network that uses all of its capacity loses accuracy early.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from unic_ds import dist
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.evaluator import images_used
from unic_ds.evaluate.features import Annotation, FeatureSet, Model, ModelOutput
from unic_ds.evaluate.linear import fit_probes
from unic_ds.evaluate.probe import REMEDY, accuracy
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.rankme import second_moment

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Parts of the weights that are set to zero; each costs a pass of the images."""
DIMENSIONS = (768, 384, 192, 96, 48, 24, 12, 6)
ROWS = 4096


class Utility:
    """Accuracy in % of the linear probe, by share of weights pruned and by PCA dimensions."""

    model_needs: frozenset[ModelOutput] = frozenset({"cls"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `utility unchanged`, `utility PCA 48`, ..., and `utility L1 50 %`, ... .

        A model that cannot be pruned (`Model.pruned`) has no scores of pruning. The probes are
        fitted to features without augmentation.
        """
        sides = data.features(models)
        unchanged = {model.name: Variant(model, "unchanged") for model in models}
        yield from probed(unchanged, sides, data)
        for model in models:
            axes = PrincipalAxes.of(sides[0].cls[model.name], data.device)
            counts = [count for count in DIMENSIONS if count <= axes.count]
            parts = {f"PCA {count}": Variant(model, f"PCA {count}") for count in counts}
            if parts:
                found = [projected(side, model.name, axes, counts) for side in sides]
                yield from probed(parts, found, data)
        for share in SHARES:
            yield from self.pruned(models, share, data)

    def pruned(self, models: Sequence[Model], share: float, data: EvalData) -> Iterator[Score]:
        """Scores of the models that can be pruned; the images are decoded once for all of them."""
        # Without an identity, so that the features are not kept on the disk.
        parts = [
            replace(model.pruned(share), name=model.name, identity="")
            for model in models
            if model.pruned
        ]
        if parts:
            sides = replace(data, extracted={}).features(parts)
            change = f"L1 {100 * share:.0f} %"
            yield from probed({part.name: Variant(part, change) for part in parts}, sides, data)
        for part in parts:
            if part.frees:
                part.frees()


class Variant(NamedTuple):
    """A model, and what is changed about it or its features."""

    model: Model
    change: str


def probed(
    variants: Mapping[str, Variant], sides: Sequence[FeatureSet], data: EvalData
) -> Iterator[Score]:
    """Scores of probes fitted to the first of the sides and tested on the second.

    The variants have the names of their features.
    """
    train, val = (side.labelled() for side in sides)
    probes = fit_probes(train, data)
    for name, (model, change) in variants.items():
        value = accuracy(probes[name], val, name).top1
        used = images_used(len(train.label_N), len(val.label_N), model)
        how = f"utility {change}: linear {probes[name].rule} {used}"
        yield Score(model.name, f"utility {change}", value, how)


@dataclass(frozen=True)
class PrincipalAxes:
    """Principal axes of features from their mean, in fp64 on the CPU."""

    mean_C: Tensor
    axes_CD: Tensor
    """The widest first; one along which fp32 features do not differ is 0."""

    @property
    def count(self) -> int:
        """Number of axes D: of channels, or of rows less one if they are fewer."""
        return self.axes_CD.shape[1]

    @classmethod
    def of(cls, x_RC: Tensor, device: torch.device) -> PrincipalAxes:
        """The axes of all ranks' rows, the same on every rank; every rank calls it."""
        sum_C = x_RC.sum(0, dtype=torch.float64)
        total = dist.all_reduce_sum(torch.cat([sum_C, sum_C.new_tensor([len(x_RC)])]))
        mean_C, count = total[:-1] / total[-1], int(total[-1])
        axes_CC = square_CC = second_moment(x_RC, mean_C, device)
        with raised_on_all_ranks("the principal components", REMEDY):
            square_C, axes_CC = torch.linalg.eigh(square_CC)
            noise = len(square_C) * torch.finfo(torch.float32).eps ** 2 * square_C[-1]
            axes_CC = (axes_CC * (square_C > noise)).flip(1)[:, : max(count - 1, 1)].cpu()
        # An axis has no sign of its own: that of rank 0 counts.
        return cls(mean_C, dist.broadcast_object(axes_CC))

    def project(self, x_RC: Tensor, count: int) -> Tensor:
        """Coordinates (R, count) of rows on the first axes, computed in fp64, stored in fp32."""
        axes_CD, parts = self.axes_CD[:, :count], x_RC.split(ROWS)
        return torch.cat([((part.double() - self.mean_C) @ axes_CD).float() for part in parts])


def projected(
    side: FeatureSet, name: str, axes: PrincipalAxes, counts: Sequence[int]
) -> FeatureSet:
    """Features `PCA N` of one model on its first N axes, for each N; every rank calls it."""
    x_RD = torch.empty(0, max(counts))
    with raised_on_all_ranks("the principal components", REMEDY):
        x_RD = axes.project(side.cls[name], max(counts))
    return replace(side, cls={f"PCA {count}": x_RD[:, :count] for count in counts})


Network = TypeVar("Network", bound=nn.Module)


def pruned_copy(module: Network, share: float) -> Network:
    """A copy in which the `share` of the weights of each linear layer that is nearest 0 is 0.

    Linear layers, and the joint projection of torch's attention; biases are kept.
    """
    module = copy.deepcopy(module)
    smallest = prune.L1Unstructured(amount=share)
    for layer in module.modules():
        name = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
        if isinstance(layer, nn.Linear | nn.MultiheadAttention):
            weight_LC = getattr(layer, name)
            if weight_LC is not None:
                weight_LC.data = smallest.prune(weight_LC.data)
    return module
