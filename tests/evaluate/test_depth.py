"""Depth against planted maps, published formulas in fp64, and torch's autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dense_sets import METRES, class_maps, constant, depth_set, one_hot, token_model
from memory_sets import scores_of
from torch import Tensor
from torch.nn import functional as F

from unic_ds.config import Eval
from unic_ds.evaluate import depth, depth_head
from unic_ds.evaluate.dense_head import CropModel, TokenMap
from unic_ds.evaluate.depth_head import RATES, DepthHeads

pytestmark = pytest.mark.filterwarnings("error")

OPTIONS = Eval(head_images=1920, size=8, batch=8)


def large(colour_B3HW: Tensor) -> Tensor:
    """The class as a one-hot vector whose length lets a head learn in few steps."""
    return 150 * one_hot(colour_B3HW)


def test_planted_depth_is_found_and_a_constant_is_not() -> None:
    """A depth an image, in windows that overlap."""
    sets = {
        name: depth_set(class_maps(30, 8, 12, block=12, seed=seed))
        for seed, name in enumerate(("train", "val"))
    }
    models = [token_model("depth", 8, 8, large), token_model("same", 8, 8, constant)]
    scores = scores_of("depth", models, sets, OPTIONS)
    value = {(s.model, s.name): s.value for s in scores}
    assert value["depth", "depth RMSE"] < 0.6 and value["depth", "depth a1"] == 100
    assert value["depth", "depth abs_rel"] < 0.2 and value["depth", "depth a3"] == 100
    assert value["same", "depth RMSE"] > 1.5 and value["same", "depth a1"] < 60
    assert scores[0].better == "lower" and scores[0].unit == "m"
    assert scores[0].protocol.startswith("depth last block CLS + patch, x4, 256 bins, SigLoss, ")
    assert "of 0.0001,0.0003,0.001,0.005 on 2 held out, 120 steps" in scores[0].protocol
    assert scores[0].protocol.endswith("0.001-10 m, 28/30 images 8 px")


def test_the_head_enlarges_and_then_convolves() -> None:
    """As the published head does; the order of the two linear maps does not change the result."""
    generator = torch.Generator().manual_seed(0)
    map_BCHW = torch.randn(2, 6, 3, 3, generator=generator)
    cls_BC = torch.randn(2, 6, generator=generator)
    heads = DepthHeads(6, seed=1, steps=10)
    with torch.no_grad():
        for at, bias_K in enumerate(heads.biases):
            bias_K += torch.randn(len(bias_K), generator=generator)
            heads.weights[at].mul_(40)
    found_BRHW = heads.metres(heads(TokenMap(map_BCHW, cls_BC)))
    both_BCHW = torch.cat([map_BCHW, cls_BC[:, :, None, None].expand(-1, -1, 3, 3)], 1)
    large_BCHW = F.interpolate(both_BCHW.double(), scale_factor=4, mode="bilinear")
    for at in range(len(RATES)):
        weight_KC = heads.weights[at].double()[:, :, None, None]
        score_BKHW = F.conv2d(large_BCHW, weight_KC, heads.biases[at].double()).relu() + 0.1
        share_BKHW = score_BKHW / score_BKHW.sum(1, keepdim=True)
        centre_K = torch.linspace(1e-3, 10, 256, dtype=torch.float64)
        depth_BHW = (share_BKHW * centre_K.view(-1, 1, 1)).sum(1)
        assert torch.allclose(found_BRHW[:, at].double(), depth_BHW, rtol=1e-4)


def sig_loss(pred_BHW: Tensor, true_BHW: Tensor) -> Tensor:
    """SigLoss as it is published."""
    known_BHW = (true_BHW > 1e-3) & (true_BHW < 10)
    gap_P = (pred_BHW[known_BHW] + 1e-3).log() - (true_BHW[known_BHW] + 1e-3).log()
    return (gap_P.var() + 0.15 * gap_P.mean().square()).sqrt()


@pytest.mark.parametrize("only_mean", [False, True])
def test_sums_make_the_gradient_of_the_whole_loss(only_mean: bool) -> None:
    """Crops in two shares, as of two ranks, beside autograd through the loss of all of them."""
    generator = torch.Generator().manual_seed(0)
    tokens = TokenMap(
        torch.randn(4, 6, 3, 3, generator=generator), torch.randn(4, 6, generator=generator)
    )
    true_BSS = torch.rand(4, 12, 12, generator=generator) * 12
    true_BSS[0, :3] = 0
    heads = DepthHeads(6, seed=1, steps=10)
    crop = CropModel(token_model("m", 12, 4, one_hot), 12)
    shares = [
        depth_head.loss_sums(
            heads, crop, TokenMap(tokens.map_BCHW[part], tokens.cls_BC[part]), true_BSS[part]
        )
        for part in (slice(1), slice(1, 4))
    ]
    sum_3R = shares[0].sum_3R + shares[1].sum_3R
    pairs = [a + b for a, b in zip(shares[0].grads, shares[1].grads, strict=True)]
    found = depth_head.loss_grads(sum_3R, pairs, only_mean=only_mean)
    assert int(sum_3R[0, 0]) == int(((true_BSS > 1e-3) & (true_BSS < 10)).sum())
    pred_BRSS = crop.at_pixels(heads.metres(heads(tokens)))
    loss = torch.zeros(())
    for at in range(len(RATES)):
        if only_mean:
            known_BSS = (true_BSS > 1e-3) & (true_BSS < 10)
            gap_P = (pred_BRSS[:, at] + 1e-3).log() - (true_BSS + 1e-3).log()
            loss = loss + math.sqrt(0.15) * gap_P[known_BSS].mean().abs()
        else:
            loss = loss + sig_loss(pred_BRSS[:, at], true_BSS)
    expected = torch.autograd.grad(loss, list(heads.parameters()))
    for mine, right in zip(found, expected, strict=True):
        assert torch.allclose(mine, right, rtol=1e-3, atol=1e-7)


def test_a_step_without_depth_moves_nothing_but_the_decay() -> None:
    heads = DepthHeads(2, seed=0, steps=10)
    crop = CropModel(token_model("m", 8, 4, one_hot), 8)
    sums = depth_head.loss_sums(
        heads, crop, TokenMap(torch.ones(1, 2, 2, 2), torch.ones(1, 2)), torch.zeros(1, 8, 8)
    )
    grads = depth_head.loss_grads(sums.sum_3R, sums.grads, only_mean=False)
    assert all(not grad.any() for grad in grads)


def test_errors_are_the_published_formulas() -> None:
    """An image of NYU's size is scored inside Eigen's crop, others as a whole."""
    generator = torch.Generator().manual_seed(0)
    for size, inside in (((480, 640), (slice(45, 471), slice(41, 601))), ((60, 50), (..., ...))):
        true_HW = torch.rand(size, generator=generator) * 11
        pred_1HW = torch.rand(1, *size, generator=generator) * 12
        found_6 = depth.image_errors(pred_1HW, true_HW)[0].tolist()
        true, pred = true_HW.double().numpy(), pred_1HW[0].double().numpy().clip(1e-3, 10)
        if size == (480, 640):
            true, pred = true[inside], pred[inside]
        known = (true > 1e-3) & (true < 10)
        true, pred = true[known], pred[known]
        ratio = np.maximum(true / pred, pred / true)
        expected = [
            np.sqrt(((true - pred) ** 2).mean()),
            (np.abs(true - pred) / true).mean(),
            *(100 * (ratio < 1.25**power).mean() for power in (1, 2, 3)),
        ]
        assert found_6 == pytest.approx([*expected, 1])
    assert not depth.image_errors(pred_1HW, torch.zeros(size)).any()


def test_the_hold_out_is_of_consecutive_images() -> None:
    held_N, kept_N = depth.hold_out(100, seed=3)
    assert len(held_N) == 5 and sorted([*held_N, *kept_N]) == list(range(100))
    assert sum((np.diff(np.sort(held_N)) != 1).tolist()) <= 1  # around the end, perhaps
    assert len(depth.hold_out(24_231, seed=3)[0]) == 654
    with pytest.raises(ValueError, match="two training images or more"):
        depth.hold_out(1, seed=0)


def test_the_rate_of_the_smallest_error_is_chosen() -> None:
    assert depth.best_rate(torch.tensor([0.5, torch.nan, 0.4, 0.4])) == 2


def test_a_crop_stays_on_its_depth() -> None:
    sample = depth_set(class_maps(1, 48, 64, block=16)).samples[0]
    for draws in ([0.0, 0.9, 0.1, 0.0, 0.9, 0.5], [0.99, 0.1, 0.9, 0.9, 0.0, 0.5]):
        crop = depth.cut_crop(sample, np.array(draws), 32)
        assert crop.image_3SS.shape == (3, 32, 32) and crop.image_3SS.dtype == torch.uint8
        class_SS = crop.image_3SS.float().argmax(0)
        assert (METRES[class_SS] == crop.target_SS).float().mean() > 0.9


def test_maps_in_another_unit_are_refused() -> None:
    sets = {name: depth_set(class_maps(3, 16, 16, block=8)) for name in ("train", "val")}
    for sample in sets["val"].samples:
        sample.depth_HW.mul_(1000)
    model = token_model("m", 16, 4, one_hot)
    with pytest.raises(ValueError, match="m; check that its maps are in mm"):
        scores_of("depth", [model], sets, Eval(head_images=32, size=16))


def test_the_rate_rises_and_falls_to_0() -> None:
    factors = [depth_head.rate_factor(step, steps=38_400) for step in (0, 6400, 12_800, 38_400)]
    half = 0.5 * (1 + math.cos(math.pi / 6))
    expected = [1e-3, (1e-3 + 0.999 / 2) * half, 0.5 * (1 + math.cos(math.pi / 3)), 0]
    assert factors == pytest.approx(expected)
