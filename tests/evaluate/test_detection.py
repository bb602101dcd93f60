"""Detectors on frozen maps: what they learn, what they leave alone, and their frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from forked import Forked
from memory_samples import MemorySamples, patch_model
from memory_sets import scores_of
from painted_objects import PATCH, SIDE, SMALL, painted, seeing, sets
from runs import SUPPORT, run
from torch import Tensor, nn

from unic_ds.config import Eval
from unic_ds.evaluate import detector_training, feature_pyramid, registry
from unic_ds.evaluate.average_precision import average_precision
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.detection import detections_of_image, truth_of
from unic_ds.evaluate.detector_training import at_sides, flipped, target
from unic_ds.evaluate.feature_pyramid import CELL, Heads, SimplePyramid
from unic_ds.evaluate.features import Model, Outputs
from unic_ds.evaluate.samples import BoxedImage

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task with small heads, under its own name."""
    monkeypatch.setitem(registry.EVALUATORS, "detection", SMALL)


def test_objects_that_features_tell_are_detected() -> None:
    """And features that are all the same detect nothing; the random state is left alone."""
    blind = patch_model("blind", SIDE, PATCH, lambda x_BN3: torch.ones(*x_BN3.shape[:2], 12))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    images = sets(64, 8, masks=True)
    scores = scores_of("detection", [seeing(), blind], images, Eval(head_images=240))
    assert torch.equal(torch.get_rng_state(), before)
    value = {(score.model, score.name): score.value for score in scores}
    assert len(value) == 6 and value["colours", "detection box AP50"] > 50
    assert value["colours", "detection mask AP"] > 15 < value["colours", "detection box AP"]
    assert value["blind", "detection box AP50"] < 25
    assert "Mask R-CNN" in scores[0].protocol
    assert "240 images shown, 8 tested, 64 px padded" in scores[0].protocol


def frozen_vit() -> tuple[nn.Module, Model]:
    """A real ViT, which as a model keeps its graph, so that a gradient could reach it."""
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=SIDE, num_classes=0)

    def encode(image_B3SS: Tensor, _: object) -> Outputs:
        return Outputs(patch_BNC=vit.forward_features(image_B3SS / 255)[:, vit.num_prefix_tokens :])

    return vit.eval(), Model("vit", SIDE, frozenset({"patch"}), encode, patch=16)


def test_no_gradient_reaches_the_encoder() -> None:
    vit, model = frozen_vit()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    images = sets(4, 2)
    (box_ap, box_ap50) = scores_of("detection", [model], images, Eval(head_images=2))
    assert "batch 2, 16 of 32 regions, 2 images shown" in box_ap.protocol
    assert 0 <= box_ap.value <= box_ap50.value and "Faster R-CNN" in box_ap.protocol
    assert not vit.training and all(weight.grad is None for weight in vit.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_the_pyramid_is_vitdets() -> None:
    """Sides, channels, parameters of the default size; no layer depends on the batch."""
    pyramid = SimplePyramid(768, 256)
    maps = pyramid(torch.zeros(1, 768, 8, 8))
    sides = {name: tuple(map_BCHW.shape[1:]) for name, map_BCHW in maps.items()}
    assert list(sides) == ["0", "1", "2", "3", "pool"]
    assert [shape[1] for shape in sides.values()] == [32, 16, 8, 4, 2]
    assert all(shape[0] == 256 for shape in sides.values())
    upwards = 768 * 384 * 4 + 384 + 2 * 384 + 384 * 192 * 4 + 192 + 768 * 384 * 4 + 384
    outputs = (192 + 384 + 768 + 768) * 256 + 4 * (256 * 256 * 9 + 4 * 256)
    assert sum(weight.numel() for weight in pyramid.parameters()) == upwards + outputs
    detector = feature_pyramid.detector(768, 80, Heads(), masks=True)
    assert not [part for part in detector.modules() if isinstance(part, nn.BatchNorm2d)]


def test_boxes_of_the_frame_are_those_of_the_image() -> None:
    """Targets of a wide, flipped image, taken as detections, have an AP of 100."""
    wide = painted(3)
    tall = BoxedImage(
        wide.image_3HW.transpose(1, 2),
        wide.box_M4[:, [1, 0, 3, 2]],
        wide.class_M,
        wide.crowd_M,
        wide.mask_MHW.transpose(1, 2),
    )
    for sample in (wide, flipped(tall)):
        square = at_sides(sample, [48]).squares[48]
        frame = CELL * 6
        wanted = target(sample, square, frame, masks=True)
        inside_MFF = wanted["masks"].bool()
        for mask_FF, box_4 in zip(inside_MFF, wanted["boxes"], strict=True):
            rows, columns = torch.where(mask_FF)
            x0, y0, x1, y1 = box_4.tolist()
            assert abs(columns.min() - x0) < 1 and abs(columns.max() + 1 - x1) < 1
            assert abs(rows.min() - y0) < 1 and abs(rows.max() + 1 - y1) < 1
        row = {"boxes": wanted["boxes"], "labels": wanted["labels"], "scores": torch.ones(2)}
        row["masks"] = torch.ones(2, 1, 28, 28)
        found = detections_of_image(row, sample, square, frame / 48)
        truth = truth_of(sample, masks=True)
        for kind in ("bbox", "segm"):
            assert average_precision([truth], [found], classes=2, kind=kind) == (100, 100)


def test_crowds_are_not_learned() -> None:
    sample = painted(3)._replace(crowd_M=torch.tensor([True, False]))
    wanted = target(sample, at_sides(sample, [SIDE]).squares[SIDE], SIDE, masks=False)
    assert wanted["labels"].tolist() == [int(sample.class_M[1]) + 1]
    assert wanted["boxes"].tolist() == [sample.box_M4[1].tolist()]


def test_every_image_is_shown_once_an_epoch() -> None:
    places = list(detector_training.places_of(range(21), 7, seed=3))
    assert [sorted(places[at : at + 7]) for at in (0, 7, 14)] == [list(range(7))] * 3
    assert places[:7] != places[7:14] != places[14:]
    assert list(detector_training.places_of(range(5, 21, 4), 7, seed=3)) == places[5::4]
    factors = [detector_training.factor_at(step, 2700) for step in (0, 249, 2399, 2400, 2600)]
    assert factors == pytest.approx([1 / 251, 250 / 251, 1, 0.1, 0.01])


def test_what_cannot_be_evaluated_is_one_sentence() -> None:
    none = MemorySamples([None], frozenset({"boxes"}), ("red", "blue"))
    images = sets(2, 2)
    options = Eval(head_images=16)
    with pytest.raises(ValueError, match="no training image of 'memory' can be read"):
        scores_of("detection", [seeing()], images | {"train": none}, options)
    with pytest.raises(ValueError, match="no validation image of 'memory' can be read"):
        scores_of("detection", [seeing()], images | {"val": none}, options)
    with pytest.raises(RuntimeError, match="has one patch token at 64 px; detection needs"):
        scores_of("detection", [patch_model("one", SIDE, SIDE, lambda x: x)], images, options)
    broken = patch_model("nan", SIDE, PATCH, lambda x_BN3: x_BN3 * torch.nan)
    with pytest.raises(RuntimeError, match="patch tokens of 'nan' are NaN or infinite"):
        scores_of("detection", [broken], images, options)


def test_a_step_has_as_many_images_on_any_number_of_ranks() -> None:
    assert detector_training.numbers_of(3, 4, rows=4) == list(range(12))
    assert detector_training.numbers_of(2, 3, rows=4) == [0, 1, 2, None, 3, 4, 5, None]
    places = list(detector_training.places_of([0, None, 1], 7, seed=3))
    assert places[::2] == list(detector_training.places_of([0, 1], 7, seed=3))
    assert places[1] is None


@pytest.mark.dist
def test_two_ranks_find_the_same_scores(tmp_path: Path) -> None:
    """With images that cannot be read, of models alike that have collectives in their forward.

    A step has 3 images; of the validation images one rank reads 2, the other 1.
    """
    file = tmp_path / "scores.json"
    printed = run(Forked(2, [str(SUPPORT / "painted_objects.py"), str(file)]))
    first, second = ([Score(*score) for score in scores] for scores in json.loads(file.read_text()))
    assert first == second and len(first) == 8
    assert [score.value for score in first[:3]] == [score.value for score in first[3:6]]
    assert "detection: 16 steps train little" in printed
    assert "batch 3, 16 of 32 regions, 43 images shown, 3 tested" in first[0].protocol
    assert "5 images were left out of all models" in printed
    assert [score.value for score in first[6:]] == [100, 100]
    assert "mean over 4 pairs" in first[6].protocol
