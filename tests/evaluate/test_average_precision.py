"""COCO's average precision against pycocotools and a case by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from unic_ds.evaluate import average_precision as ap
from unic_ds.evaluate.average_precision import Found, Kind, Truth

pytestmark = pytest.mark.filterwarnings("error")

HEIGHT, WIDTH, CLASSES = 60, 80, 3


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner_M2 = rng.uniform(0, 40, (count, 2))
    return np.hstack([corner_M2, corner_M2 + rng.uniform(4, 20, (count, 2))]).astype(np.float32)


def ellipses(box_M4: np.ndarray) -> tuple[bytes, ...]:
    """Masks that fill their boxes but for the corners."""
    y_H1, x_1W = np.mgrid[:HEIGHT, :1][0], np.mgrid[:1, :WIDTH][1]
    found = np.zeros((len(box_M4), HEIGHT, WIDTH), dtype=bool)
    for mask_HW, (x0, y0, x1, y1) in zip(found, box_M4, strict=True):
        x_1, y_1 = (2 * x_1W - x0 - x1) / (x1 - x0), (2 * y_H1 - y0 - y1) / (y1 - y0)
        mask_HW[:] = x_1**2 + y_1**2 <= 1
    return ap.compressed(torch.from_numpy(found)) if len(box_M4) else ()


def image(rng: np.random.Generator) -> tuple[Truth, Found]:
    """Objects, some of them crowds, and detections near them or anywhere, some of them none."""
    box_M4 = boxes(rng, rng.integers(0, 6))
    class_M, crowd_M = rng.integers(CLASSES, size=len(box_M4)), rng.random(len(box_M4)) < 0.2
    near_D4 = np.repeat(box_M4, 2, 0) + rng.normal(0, 1.5, (2 * len(box_M4), 4))
    box_D4 = np.vstack([near_D4, boxes(rng, 3)]).astype(np.float32)
    class_D = np.append(np.repeat(class_M, 2), rng.integers(CLASSES, size=3))
    score_D = rng.random(len(box_D4)).astype(np.float32)
    return (
        Truth(HEIGHT, WIDTH, box_M4, class_M, crowd_M, ellipses(box_M4)),
        Found(box_D4, class_D, score_D, ellipses(box_D4)),
    )


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_it_is_that_of_pycocotools(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    truth, found = zip(*(image(rng) for _ in range(20)), strict=True)
    values = ap.average_precision(truth, found, classes=CLASSES, kind=kind)
    assert capsys.readouterr().out == ""
    objects = COCO()
    objects.dataset = ap.dataset(truth, CLASSES, kind) | {"info": {}}
    objects.createIndex()
    scores = COCOeval(objects, objects.loadRes(ap.entries(truth, found, kind)), kind)
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    assert values == pytest.approx(100 * scores.stats[:2], abs=1e-9)
    assert 5 < values[0] < values[1] < 95


def test_by_hand() -> None:
    """A box of IoU 0.6 counts at 0.5, 0.55 and 0.6, an exact one everywhere."""
    box_14 = np.array([[0, 0, 10, 10]], dtype=np.float32)
    truth = Truth(20, 20, box_14, np.array([0]), np.array([False]), None)
    box_24 = np.array([[0, 0, 10, 6], [0, 0, 10, 10]], dtype=np.float32)
    found = Found(box_24[:1], np.array([0]), np.array([0.5], dtype=np.float32), None)
    none = Found(box_24[:0], np.zeros(0, int), np.zeros(0), None)
    exact = found._replace(box_D4=box_24[1:])
    for one, expected in ((found, (30, 100)), (none, (0, 0)), (exact, (100, 100))):
        values = ap.average_precision([truth], [one], classes=1, kind="bbox")
        assert values == pytest.approx(expected)
    crowd = truth._replace(crowd_M=np.array([True]))
    with pytest.raises(ValueError, match="have no object; add some"):
        ap.average_precision([crowd], [found], classes=1, kind="bbox")
