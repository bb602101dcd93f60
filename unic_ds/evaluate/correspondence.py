"""Semantic correspondence: keypoints of one image found in another by patch tokens, untrained.

SPair-71k (arXiv 1908.10543), measured as for DINOv3 (arXiv 2508.10104) and Probe3D (2404.08636):
the mean over image pairs of the share of keypoints that are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.readable import in_rounds, prepared, rounds_of, say_left_out
from unic_ds.evaluate.samples import ImagePair, share
from unic_ds.evaluate.squares import Square, at_side, padded_square, square_maps

SIDE = 512
ALPHA = 0.1
"""Largest distance of a found keypoint, as a part of the longer side of the object's box."""
CHANNELS = 64
"""Channels of a map that are upsampled at once: 64 MB at 512 px."""
POINTS = 64
"""Keypoints whose cosines are upsampled at once: 64 MB at 512 px."""
REMEDY = "lower --eval.batch"


class PairOfSquares(NamedTuple):
    """An image pair, and its source and target as squares by their side."""

    pair: ImagePair
    squares: Mapping[int, tuple[Square, Square]]


class Correspondence:
    """PCK@0.1 in % of the set `val`: the share of keypoints found within 0.1 box sides."""

    model_needs: frozenset[ModelOutput] = frozenset({"patch"})
    data_needs: frozenset[Annotation] = frozenset({"keypoints"})

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield the PCK of each model; ValueError if no pair can be read."""
        with ExitStack() as stack:
            with raised_on_all_ranks("correspondence", REMEDY):
                side = data.options.size or SIDE
                sized = [stack.enter_context(at_side(model, side)) for model in models]
            pck_M, count = measure(sized, data)
        for model, pck in zip(sized, pck_M.tolist(), strict=True):
            rule = f"PCK@{ALPHA} of the box, mean over {count} pairs, cosine of bilinear patch maps"
            protocol = f"correspondence {rule}, {model.size} px padded"
            yield Score(model.name, "correspondence PCK@0.1", 100 * pck, protocol)


@torch.inference_mode()
def measure(models: Sequence[Model], data: EvalData) -> tuple[Tensor, int]:
    """Mean PCK (M) of the models and the number of pairs; every rank calls it."""
    samples = data.samples("val")
    size = max(1, data.options.batch // 2)
    rounds = rounds_of(len(samples), size)
    sum_M, count = torch.zeros(len(models), dtype=torch.float64), 0
    failures: set[str] = set()
    sides = {model.size for model in models}
    places = share(range(len(samples)))
    shown = prepared(samples, places, lambda _, pair: at_sides(pair, sides), failures=failures)
    for batch in in_rounds(shown, size, rounds=rounds, task="correspondence", remedy=REMEDY):
        for at, model in enumerate(models):
            with raised_on_all_ranks("correspondence", REMEDY):
                sum_M[at] += pck_of(model, batch, data.device).sum()
        count += len(batch)
    say_left_out("correspondence", failures)
    *sums, total = dist.all_reduce_sum(torch.cat([sum_M, sum_M.new_tensor([count])])).tolist()
    if not total:
        raise ValueError(f"no image pair of {samples.name!r} can be read; see the log")
    return torch.tensor(sums, dtype=torch.float64) / total, int(total)


def at_sides(pair: ImagePair, sides: Iterable[int]) -> PairOfSquares:
    """The pair with its images as squares of each side."""
    images = pair.source_3HW, pair.target_3HW
    squares = {
        side: (padded_square(images[0], side), padded_square(images[1], side)) for side in sides
    }
    return PairOfSquares(pair, squares)


def pck_of(model: Model, pairs: Sequence[PairOfSquares], device: torch.device) -> Tensor:
    """The share (B, fp64) of each pair's keypoints that the model finds."""
    sources = [squares[model.size][0] for _, squares in pairs]
    targets = [squares[model.size][1] for _, squares in pairs]
    map_BCGG = F.normalize(square_maps(model, sources + targets, device), dim=1)
    found = [torch.zeros(0, dtype=torch.float64)]
    for at, ((pair, _), source, target) in enumerate(zip(pairs, sources, targets, strict=True)):
        # Keypoints name pixels, whose centres lie half a pixel further.
        point_K2 = ((pair.source_K2 + 0.5) * source.scale_2).to(device)
        match_K2 = match(map_BCGG[at], map_BCGG[at + len(pairs)], point_K2, target).cpu()
        distance_K = (match_K2 / target.scale_2 - 0.5 - pair.target_K2).norm(dim=1)
        x0, y0, x1, y1 = pair.target_box_4.tolist()
        found.append((distance_K <= ALPHA * max(x1 - x0, y1 - y0)).double().mean()[None])
    return torch.cat(found)


def match(source_CGG: Tensor, target_CGG: Tensor, point_K2: Tensor, target: Square) -> Tensor:
    """Centres (K, 2: x, y) of the pixels of `target` whose features are nearest by the cosine.

    Both maps are upsampled bilinearly to the square; padding is not searched.
    """
    side = target.image_3SS.shape[-1]
    width, height = (int(length) for length in target.size_2.tolist())
    grid_11K2 = (2 * point_K2 / side - 1)[None, None]
    feature_1C1K = F.grid_sample(
        source_CGG[None], grid_11K2, padding_mode="border", align_corners=False
    )
    # Upsampling is linear: cosines of K keypoints take its place for C channels.
    cosine_KGG = torch.einsum("ck,cgh->kgh", feature_1C1K[0, :, 0], target_CGG)
    norm_HW = upsampled_norm(target_CGG, side)[:height, :width]
    found = []
    for part_KGG in cosine_KGG.split(POINTS):
        cosine_KHW = upsampled(part_KGG, side)[:, :height, :width] / norm_HW
        found.append(cosine_KHW.flatten(1).argmax(1))
    at_K = torch.cat(found)
    return torch.stack([at_K % width, at_K // width], dim=1) + 0.5


def upsampled(map_CGG: Tensor, side: int) -> Tensor:
    """A map at `side` x `side` pixels, bilinear."""
    return F.interpolate(map_CGG[None], (side, side), mode="bilinear", align_corners=False)[0]


def upsampled_norm(map_CGG: Tensor, side: int) -> Tensor:
    """Norms (S, S) of the upsampled map's vectors."""
    square_SS = map_CGG.new_zeros(side, side)
    for part_CGG in map_CGG.split(CHANNELS):
        square_SS += upsampled(part_CGG, side).square().sum(0)
    return square_SS.sqrt().clamp(min=1e-12)
