"""Segmentation against planted masks, torchmetrics and windows that are merged by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_sets import (
    CLASSES,
    MemorySamples,
    class_maps,
    constant,
    depth_set,
    mask_set,
    one_hot,
    token_model,
)
from memory_sets import scores_of
from torch import Tensor
from torch.nn import functional as F

from unic_ds.config import Eval
from unic_ds.evaluate import registry, segmentation
from unic_ds.evaluate.dense_head import CropModel, crop_models
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.samples import IGNORED
from unic_ds.evaluate.sliding import Windows, scaled_size, starts, window_corners

pytestmark = pytest.mark.filterwarnings("error")

OPTIONS = Eval(head_images=480, size=16, batch=8)


def sets_of(
    count: int = 12, height: int = 16, width: int = 24, block: int = 8
) -> dict[str, MemorySamples]:
    return {
        name: mask_set(class_maps(count, height, width, block=block, seed=seed), ignored_rows=3)
        for seed, name in enumerate(("train", "val"))
    }


def test_tokens_that_are_the_mask_score_100_and_constant_ones_a_class_s_share() -> None:
    """A token a pixel, so that no boundary is between two tokens; windows overlap."""
    sets = sets_of()
    models = [token_model("mask", 16, 1, one_hot), token_model("same", 16, 1, constant)]
    scores = {s[:2]: s for s in scores_of("segmentation", models, sets, OPTIONS)}
    assert scores["mask", "segmentation mIoU"].value == 100
    assert scores["mask", "segmentation accuracy"].value == 100
    label_P = torch.cat([s.mask_HW.flatten() for s in sets["val"].samples])
    share_K = label_P[label_P != IGNORED].bincount() / (label_P != IGNORED).sum()
    accuracy = scores["same", "segmentation accuracy"].value
    assert min(abs(accuracy - 100 * share) for share in share_K.tolist()) < 1e-4
    assert scores["same", "segmentation mIoU"].value == pytest.approx(accuracy / 3)
    assert scores["mask", "segmentation mIoU"].protocol == (
        "segmentation last block BatchNorm + 1x1 conv, AdamW 0.001, 30 steps of 16 crops, 16 px,"
        " slide 16/11, 3 classes, 12/12 images 16 px"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("task, make", [("segmentation", mask_set), ("depth", depth_set)])
def test_a_gpu_finds_the_scores_of_the_cpu(
    task: str, make: Callable[[Sequence[Tensor]], MemorySamples]
) -> None:
    sets = {
        name: make(class_maps(8, 16, 24, block=8, seed=seed))
        for seed, name in enumerate(("train", "val"))
    }
    models = [token_model("p4", 16, 4, one_hot)]
    found = []
    for device in ("cpu", "cuda"):
        data = EvalData(sets, options=OPTIONS, seed=0, device=torch.device(device))
        found.append([score.value for score in registry.evaluate_models(models, data, [task])])
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_the_score_is_torchmetrics() -> None:
    """Of a model of coarse tokens, at masks of another size than the crop."""
    from torchmetrics.classification import MulticlassJaccardIndex

    generator = torch.Generator().manual_seed(0)
    metric = MulticlassJaccardIndex(7, ignore_index=IGNORED, average="macro")
    count_3K = torch.zeros(3, 7, dtype=torch.int64)
    for _ in range(3):
        pred_HW = torch.randint(0, 6, (20, 30), generator=generator)
        mask_HW = torch.randint(0, 5, (20, 30), generator=generator).to(torch.uint8)
        mask_HW[torch.rand(20, 30, generator=generator) < 0.2] = IGNORED
        metric.update(pred_HW, mask_HW.long())
        count_3K += segmentation.counts(pred_HW, mask_HW, 7)
    iou, accuracy = segmentation.measures(count_3K)  # class 6 occurs nowhere, and does not count
    assert iou == pytest.approx(100 * float(metric.compute()), rel=1e-6)
    assert 10 < accuracy < 25


def test_models_of_several_grids_and_sides_share_the_images(capsys: Any) -> None:
    """A patch of 7 px: crops of 16 px are padded to 21; an unreadable image counts nowhere."""
    sets = sets_of(height=32, width=48, block=16)
    samples = [*sets["val"].samples[:-1], None]
    sets["val"] = MemorySamples(samples, frozenset({"masks"}), CLASSES)
    models = [
        token_model("p7", 14, 7, one_hot, flexible=True),
        token_model("p4", 8, 4, one_hot),
        token_model("p1", 16, 1, one_hot),
    ]
    scores = {s[:2]: s for s in scores_of("segmentation", models, sets, OPTIONS)}
    value = {m.name: scores[m.name, "segmentation mIoU"].value for m in models}
    assert value["p1"] > 95 and all(50 < value[name] < value["p1"] for name in ("p4", "p7")), value
    assert "16 px padded to 21, slide 16/11" in scores["p7", "segmentation mIoU"].protocol
    assert "8 px, slide 8/5" in scores["p4", "segmentation mIoU"].protocol
    assert scores["p7", "segmentation mIoU"].protocol.endswith("12/11 images 21 px")
    printed = capsys.readouterr().out
    assert "1 of 12 images of memory are left out:\n  11.png is cut off" in printed


def test_sets_without_a_labelled_pixel_are_refused() -> None:
    sets = sets_of(2)
    sets["train"] = mask_set(class_maps(2, 16, 16, block=8), ignored_rows=16)
    model = token_model("mask", 16, 1, one_hot)
    with pytest.raises(ValueError, match="no labelled pixel of 'memory' can be read"):
        scores_of("segmentation", [model], sets, Eval(head_images=32, size=16))


def test_features_that_are_nan_are_refused() -> None:
    model = token_model("broken", 16, 1, lambda colour: colour * torch.nan)
    with pytest.raises(RuntimeError, match="features of 'broken' are NaN or infinite"):
        scores_of("segmentation", [model], sets_of(2), Eval(head_images=32, size=16))


def test_models_of_another_side_are_freed() -> None:
    """Those that are built for the task alone, also if it fails."""
    freed: list[str] = []
    own = replace(
        token_model("own", 16, 4, one_hot, flexible=True), frees=lambda: freed.append("own")
    )
    other = replace(
        token_model("other", 8, 4, one_hot),
        at=lambda side: replace(
            token_model("built", side, 4, one_hot), frees=lambda: freed.append("built")
        ),
    )
    fixed = token_model("fixed", 12, 4, one_hot)
    with pytest.raises(ZeroDivisionError), crop_models([own, other, fixed], 15) as crops:
        assert [(crop.model.name, crop.model.size, crop.side) for crop in crops] == [
            ("own", 16, 15), ("built", 16, 15), ("fixed", 12, 12)
        ]  # fmt: skip
        assert not freed
        raise ZeroDivisionError
    assert freed == ["built"]


def test_windows_cover_an_image_as_published() -> None:
    assert starts(512, 512) == [0]
    assert starts(683, 512) == [0, 171]
    assert starts(1024, 512) == [0, 341, 512]
    assert starts(300, 512) == [0]
    assert window_corners((512, 900), 512) == [(0, 0), (0, 341), (0, 388)]
    assert scaled_size((300, 400), 512) == (512, 683)
    assert scaled_size((100, 1000), 512) == (205, 2048)  # the longer side is 4 crops at most


def test_windows_of_positions_make_the_whole_image() -> None:
    """Each window holds its pixels' positions: the mean over windows is the position."""
    height, width, side = 20, 41, 16
    y_HW, x_HW = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    whole_KHW = torch.stack([y_HW, x_HW]).float()
    corners = window_corners((height, width), side)
    windows = torch.stack([whole_KHW[:, y : y + side, x : x + side] for y, x in corners])
    crop = CropModel(token_model("m", side, 1, one_hot), side)
    assert torch.equal(Windows(crop, windows, corners, (height, width)).merged(), whole_KHW)


def test_padding_is_cut_off_in_its_place() -> None:
    """A crop of 10 px in an image of 12: the values are those of the middle."""
    crop = CropModel(token_model("m", 12, 1, one_hot), 10)
    value_1KHW = torch.arange(144.0).view(1, 1, 12, 12)
    assert torch.equal(crop.at_pixels(value_1KHW), value_1KHW[..., 1:-1, 1:-1])
    image_B3SS = torch.full((2, 3, 10, 10), 200, dtype=torch.uint8)
    image_B3SS[:, 0] = 0
    tokens = crop.tokens(image_B3SS, frozenset({"patch"}), batch=1).map_BCHW
    assert tokens[:, :, 1:-1, 1:-1].argmax(1).unique().tolist() == [1]
    assert tokens[:, :, 0].argmax(1).unique().tolist() == [0]  # the padding is reddish


def test_some_classes_at_a_time_are_the_argmax() -> None:
    logits_KHW = torch.randn(11, 9, 13, generator=torch.Generator().manual_seed(0))
    large_KHW = F.interpolate(logits_KHW[None], (40, 50), mode="bilinear")[0]
    assert torch.equal(segmentation.classes_at(logits_KHW, (40, 50)), large_KHW.argmax(0))
    few_HW = segmentation.classes_at(logits_KHW, (40, 50), values=3 * 40 * 50)
    assert torch.equal(few_HW, large_KHW.argmax(0))


def test_a_crop_has_no_class_that_fills_it() -> None:
    """If a try has one; the mask stays on its image, and the padding has no class."""
    mask_HW = torch.zeros(40, 40, dtype=torch.uint8)
    mask_HW[:, 30:] = 1
    y, x = segmentation.chosen_corner(mask_HW, [0.0, 0.0, 0.5, 0.9], 16)
    assert (y, x) == (12, 22)
    assert segmentation.chosen_corner(mask_HW, [0.0, 0.0, 0.5, 0.0], 16) == (12, 0)
    (sample,) = mask_set(class_maps(1, 40, 60, block=20)).samples
    for scale in (0.0, 0.2, 0.9):
        draw_K = torch.tensor([scale, 0.3, *[0.4] * 20, *[0.1] * 9]).double().numpy()
        crop = segmentation.cut_crop(sample, draw_K, 32)
        assert crop.image_3SS.shape == (3, 32, 32) and crop.target_SS.shape == (32, 32)
        known_SS = crop.target_SS != IGNORED
        alike_SS = crop.image_3SS.float().argmax(0) == crop.target_SS
        assert alike_SS[known_SS].float().mean() > 0.9  # but for the edges
        assert bool(known_SS.all()) == (scale > 0.35)


def plain_step(x_MC: Tensor, label_M: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Gradients of torch's own BatchNorm, convolution and mean cross-entropy."""
    norm = torch.nn.BatchNorm1d(x_MC.shape[1])
    with torch.no_grad():
        norm.weight.copy_(parameters[0])
        norm.bias.copy_(parameters[1])
    weight_KC, bias_K = (p.detach().clone().requires_grad_() for p in parameters[2:])
    logits_MK = F.linear(norm(x_MC), weight_KC, bias_K)
    loss = F.cross_entropy(logits_MK, label_M, ignore_index=IGNORED)
    return list(torch.autograd.grad(loss, [norm.weight, norm.bias, weight_KC, bias_K]))


def test_a_step_has_the_gradient_of_torch_s_modules() -> None:
    generator = torch.Generator().manual_seed(1)
    map_BCHW = torch.randn(3, 5, 4, 4, generator=generator) * 3 + 2
    mask_BSS = torch.randint(0, 4, (3, 4, 4), generator=generator).to(torch.uint8)
    mask_BSS[0, :2] = IGNORED
    head = segmentation.SegmentationHead(5, 4, seed=0, steps=10)
    normal = head.normal(segmentation.moments_of(map_BCHW))
    crop = CropModel(token_model("m", 4, 1, one_hot), 4)
    count, *grads = segmentation.loss_sums(head, crop, map_BCHW, normal, mask_BSS)
    assert int(count) == int((mask_BSS != IGNORED).sum())
    x_MC = map_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
    expected = plain_step(x_MC, mask_BSS.flatten().long(), list(head.parameters()))
    for found, right in zip(grads, expected, strict=True):
        assert torch.allclose(found / count, right, atol=1e-6)
    x_MC = x_MC.double()
    assert torch.allclose(head.mean_C.double(), 0.1 * x_MC.mean(0))
    assert torch.allclose(head.var_C.double(), 0.9 + 0.1 * x_MC.var(0))


def test_the_rate_rises_and_falls_to_0() -> None:
    factors = [segmentation.rate_factor(step, steps=40_000) for step in (0, 750, 1500, 20_000)]
    assert factors == pytest.approx([1e-6, 0.5 * (1 - 750 / 40_000), 1 - 1500 / 40_000, 0.5])
    assert segmentation.rate_factor(40_000, steps=40_000) == 0
