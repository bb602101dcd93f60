"""Matches of keypoints: known shifts, chance, and the whole map upsampled."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from memory_samples import MemorySamples, patch_model
from memory_sets import scores_of
from torch import Tensor
from torch.nn import functional as F

from unic_ds.evaluate import correspondence
from unic_ds.evaluate.features import Model
from unic_ds.evaluate.samples import ImagePair
from unic_ds.evaluate.squares import padded_square

pytestmark = pytest.mark.filterwarnings("error")

SIDE, PATCH = 96, 8
KEYPOINTS = frozenset({"keypoints"})


def codes(colour_BN3: Tensor) -> Tensor:
    """Features whose cosine falls with the distance of two colours (random Fourier features)."""
    draw = torch.Generator().manual_seed(0)
    wave_3C = 6 * torch.randn(3, 128, generator=draw)
    return torch.cat([(colour_BN3 @ wave_3C).cos(), (colour_BN3 @ wave_3C).sin()], 2)


def noise(colour_BN3: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(colour_BN3.sum().long().item())
    return torch.randn(*colour_BN3.shape[:2], 32, generator=draw)


def positions(width: int, height: int, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """An image whose red and green are the position of a pixel in a scene, of 160 px a side."""
    y_HW, x_HW = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    scene_2HW = torch.stack([x_HW + shift[0], y_HW + shift[1]]) * 255 / 160
    return torch.cat([scene_2HW, torch.zeros(1, height, width)]).round().to(torch.uint8)


def pair(shift: tuple[int, int], width: int = 96, height: int = 96) -> ImagePair:
    """A scene and its view from `shift` pixels further; the object is 20 px wide."""
    draw = torch.Generator().manual_seed(width + shift[0])
    low_2 = torch.tensor(shift) + 8
    room_2 = torch.tensor([width, height]) - low_2 - 8
    source_K2 = low_2 + (torch.rand(6, 2, generator=draw) * room_2).floor()
    box_4 = torch.tensor([0.0, 0.0, 20.0, 10.0])
    target_K2 = source_K2 - torch.tensor(shift)
    images = positions(width, height), positions(width, height, shift)
    return ImagePair(*images, source_K2, target_K2, box_4, "scene")


def pck(model: Model, pairs: list[ImagePair | None]) -> float:
    (score,) = scores_of("correspondence", [model], {"val": MemorySamples(pairs, KEYPOINTS)})
    assert score.name == "correspondence PCK@0.1" and (score.unit, score.better) == ("%", "higher")
    return score.value


def test_a_known_shift_is_found_to_two_pixels() -> None:
    model = patch_model("codes", SIDE, PATCH, codes)
    assert pck(model, [pair((0, 0)), pair((16, 8)), pair((13, 3)), pair((21, 5), 80, 60)]) == 100
    wrong = pair((16, 8))
    assert pck(model, [wrong._replace(target_K2=wrong.source_K2)]) == 0


def test_half_of_the_points_is_half_of_a_pair() -> None:
    """The mean is over pairs, not over points."""
    one, many = pair((16, 8)), pair((0, 0))
    moved_K2 = one.target_K2[:2] + torch.tensor([[0, 0], [30, 0]])
    halved = one._replace(source_K2=one.source_K2[:2], target_K2=moved_K2)
    assert pck(patch_model("codes", SIDE, PATCH, codes), [halved, many]) == 75


def test_random_features_are_near_chance() -> None:
    model = patch_model("noise", SIDE, PATCH, noise)
    pairs = [pair((0, 0))._replace(source_3HW=positions(96, 96, (k, 0))) for k in range(1, 41)]
    wide = [one._replace(target_box_4=torch.tensor([0.0, 0.0, 90.0, 90.0])) for one in pairs]
    chance = 100 * math.pi * 9**2 / 96**2  # 2.8 %, less at the border
    assert pck(model, wide) < 3 * chance


def test_matches_are_those_of_the_map_upsampled_whole() -> None:
    draw = torch.Generator().manual_seed(3)
    source_CGG, target_CGG = torch.randn(2, 100, 6, 6, generator=draw)
    target = padded_square(torch.zeros(3, 70, 90, dtype=torch.uint8), 48)
    point_K2 = 48 * torch.rand(90, 2, generator=draw)
    grid_11K2 = (2 * point_K2.double() / 48 - 1)[None, None]
    point_CK = F.grid_sample(
        source_CGG[None].double(), grid_11K2, align_corners=False, padding_mode="border"
    )[0, :, 0]
    whole_CHW = F.interpolate(target_CGG[None].double(), (48, 48), mode="bilinear")[0]
    whole_CHW = F.normalize(whole_CHW, dim=0)[:, : round(70 * 48 / 90)]
    cosine_KP = F.normalize(point_CK, dim=0).T @ whole_CHW.flatten(1)
    x_K, y_K = (correspondence.match(source_CGG, target_CGG, point_K2, target) - 0.5).long().T
    found_K = cosine_KP.gather(1, (48 * y_K + x_K)[:, None])[:, 0]
    best_K = cosine_KP.amax(1)  # of a border's pixels, which are equal, rounding chooses
    assert (best_K - found_K).max() < 1e-6 < (best_K - cosine_KP.mean(1)).min()


def test_the_model_is_built_at_the_side_of_the_protocol_and_freed() -> None:
    freed: list[int] = []

    def at(side: int) -> Model:
        return patch_model("codes", side, 32, codes, frees=lambda: freed.append(side))

    model = replace(patch_model("codes", SIDE, 32, codes), at=at)
    pairs = MemorySamples([pair((0, 0))], KEYPOINTS)
    (score,) = scores_of("correspondence", [model], {"val": pairs})
    assert score.protocol.endswith("512 px padded") and freed == [512] and score.value == 100


def test_a_pair_that_cannot_be_read_is_left_out_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = patch_model("codes", SIDE, PATCH, codes)
    pairs = [pair((0, 0)), None, pair((16, 8))]
    (score,) = scores_of("correspondence", [model], {"val": MemorySamples(pairs, KEYPOINTS)})
    assert score.value == 100 and "mean over 2 pairs" in score.protocol
    printed = capsys.readouterr().out
    assert "1 image was left out of all models; first: 1.png is cut off" in printed
    with pytest.raises(ValueError, match="no image pair of 'memory' can be read"):
        pck(model, [None])
    broken = patch_model("nan", SIDE, PATCH, lambda x: x * math.nan)
    with pytest.raises(RuntimeError, match="'nan' are NaN or infinite"):
        pck(broken, [pair((0, 0))])
