"""COCO's layout: what is read, and what is refused before an image is decoded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_samples import save
from pycocotools import mask as oracle

from unic_ds.config import Config, Eval
from unic_ds.evaluate.samples import UnreadableImage
from unic_ds.harness.layouts import coco, coco_masks, open_sets

pytestmark = pytest.mark.filterwarnings("error")

SQUARE = [[2, 2, 12, 2, 12, 10, 2, 10]]
CROWD = {"size": [16, 24], "counts": [32, 16, 336]}
Described = dict[str, list[dict[str, Any]]]


def described() -> Described:
    """Three images of 24 x 16 px: two objects and a crowd, one object, none."""
    images = [
        {"id": at, "file_name": f"{at}.png", "width": 24, "height": 16} for at in (30, 20, 10)
    ]
    rows = [(30, 7, 0, SQUARE), (30, 3, 0, SQUARE), (30, 7, 1, CROWD), (20, 3, 0, SQUARE)]
    annotations = [
        {
            "id": 100 + at,
            "image_id": image,
            "category_id": category,
            "iscrowd": crowd,
            "segmentation": segmentation,
            "bbox": [2, 0, 1, 16] if crowd else [2, 2, 10, 8],
        }
        for at, (image, category, crowd, segmentation) in enumerate(rows)
    ]
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, found: object, split: str = "train") -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(found))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        write(tmp_path, described(), split)
        for number in (10, 20, 30):
            image_3HW = torch.randint(256, (3, 16, 24), generator=draw, dtype=torch.uint8)
            save(image_3HW, tmp_path / f"{split}2017/{number}.png")
    return tmp_path


def cfg(**options: int) -> Config:
    return replace(Config(), eval=Eval(**options))


def test_edited_annotations_are_another_identity(folder: Path) -> None:
    before = open_sets("detection", folder, cfg())
    assert open_sets("detection", folder, cfg())["val"].identity == before["val"].identity
    found = described()
    found["annotations"][0]["bbox"] = [2, 2, 10, 7]
    write(folder, found, "val")
    after = open_sets("detection", folder, cfg())
    assert after["val"].identity != before["val"].identity
    assert after["train"].identity == before["train"].identity


def test_images_with_instances_are_read(folder: Path) -> None:
    sets = open_sets("detection", folder, cfg())
    train, val = sets["train"], sets["val"]
    assert (len(train), len(val)) == (2, 3), "an image without an object is not trained on"
    assert val.classes == ("cat", "dog") and val.name == folder.name
    assert val.annotations == {"boxes", "masks"}
    sample = val.read(0)
    assert sample.image_3HW.shape == (3, 16, 24) and sample.image_3HW.dtype == torch.uint8
    assert sample.box_M4.tolist() == [[2, 2, 12, 10], [2, 2, 12, 10], [2, 0, 3, 16]]
    assert sample.class_M.tolist() == [1, 0, 1]
    assert sample.crowd_M.tolist() == [False, False, True]
    expected = torch.zeros(3, 16, 24, dtype=torch.bool)
    expected[:2, 2:10, 2:12] = True
    expected[2, :, 2] = True
    assert torch.equal(sample.mask_MHW, expected)
    empty = val.read(2)
    assert empty.box_M4.shape == (0, 4) and empty.mask_MHW.shape == (0, 16, 24)


def test_limits_choose_images(folder: Path) -> None:
    sets = coco.open_sets(folder, cfg(max_train=1, max_val=2))
    assert (len(sets["train"]), len(sets["val"])) == (1, 2)


def test_masks_are_left_out_if_one_instance_has_none(folder: Path, capsys: Any) -> None:
    found = described()
    found["annotations"][3]["segmentation"] = []
    write(folder, found)
    sets = coco.open_sets(folder, cfg())
    assert sets["val"].annotations == {"boxes"} and sets["val"].read(0).mask_MHW is None
    assert "not all instances have a segmentation" in capsys.readouterr().out


def test_boxes_without_area_are_left_out(folder: Path, capsys: Any) -> None:
    """As two of the published training set."""
    found = described()
    found["annotations"][1]["bbox"] = [6.65, 8.33, 1.03, 0.0]
    write(folder, found)
    assert len(coco.open_sets(folder, cfg())["train"].images[0].box_M4) == 2
    assert "1 boxes without an area are left out" in capsys.readouterr().out


def test_masks_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        height, width = rng.integers(5, 40, 2).tolist()
        outlines = [rng.uniform(0, 1, (5, 2)) * [width, height] for _ in range(2)]
        flat = [outline.flatten().tolist() for outline in outlines]
        rle = oracle.merge(oracle.frPyObjects(flat, height, width))
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # its own
            expected = oracle.decode(rle).astype(bool)
        text = {"size": [height, width], "counts": rle["counts"].decode()}
        numbers = runs(expected)
        for found in (flat, text, {"size": [height, width], "counts": numbers}):
            mask = coco_masks.parse(found)
            assert mask is not None
            assert np.array_equal(coco_masks.drawn(mask, height, width), expected)


def runs(mask_HW: np.ndarray) -> list[int]:
    """Run lengths down the columns."""
    flat = mask_HW.T.flatten()
    ends = np.flatnonzero(np.diff(flat)) + 1
    found = np.diff(np.concatenate([[0], ends, [len(flat)]])).tolist()
    return [0, *found] if flat[0] else found


@pytest.mark.parametrize(
    "found, says",
    [
        ({"size": [4, 4], "counts": [8, 9]}, "do not fill the image"),
        ({"size": [9, 4], "counts": [36]}, "run lengths of 4 x 9 pixels"),
        ({"size": [4, 4], "counts": "o" * 20}, "cannot be read"),
        ({"size": [4, 4], "counts": "\x00"}, "cannot be read"),
        ([[0, 0, 4, 4] * 300_000], "more than 2000000 pixels"),
    ],
)
def test_hostile_masks_are_refused_before_they_are_drawn(found: object, says: str) -> None:
    mask = coco_masks.parse(found)
    assert mask is not None
    with pytest.raises(ValueError, match=says):
        coco_masks.drawn(mask, 4, 4)


def of_annotation(**changed: Any) -> Callable[[Described], None]:
    return lambda found: found["annotations"][1].update(changed)


def of_image(**changed: Any) -> Callable[[Described], None]:
    return lambda found: found["images"][1].update(changed)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda found: found.pop("categories"), "it has no 'categories'"),
        (lambda found: found.update(annotations=[]), "it has no 'annotations'"),
        (lambda found: found.update(images=[3]), "'images' has entries that are no objects"),
        (lambda found: found["categories"].append({"id": 3}), "two categories have the same id"),
        (of_image(id=30), "the image id 30 is given twice"),
        (of_image(file_name="../../20.png"), "file_name '../../20.png' is no path below"),
        (of_image(width=0), "'20.png' has 0 x 16 pixels"),
        (of_annotation(image_id=5), "annotation 101 has the image_id 5, which no image has"),
        (of_annotation(category_id=5), "annotation 101 of the image '30.png' has the category_id"),
        (of_annotation(bbox=[2, 2, 30, 8]), "has the bbox [2, 2, 30, 8] in 24 x 16 pixels, but"),
        (of_annotation(bbox=[2, 2, -1, 8]), "bbox is x, y, width, height inside the image"),
        (of_annotation(bbox=[2, 2, float("nan"), 8]), "has no bbox of four numbers"),
        (of_annotation(segmentation=[[1, 2, 3, 4]]), "has a polygon of fewer than 3 corners"),
        (of_annotation(segmentation={"counts": [1]}), "run lengths without a size"),
    ],
)
def test_a_wrong_annotation_file_is_one_sentence(
    folder: Path, change: Callable[[Described], None], says: str
) -> None:
    found = described()
    change(found)
    write(folder, found)
    with pytest.raises(ValueError, match=r"instances_train2017\.json' is no annotation") as error:
        coco.open_sets(folder, cfg())
    assert says in str(error.value) and "\n" not in str(error.value)


def test_another_layout_is_refused(folder: Path, tmp_path_factory: Any) -> None:
    with pytest.raises(ValueError, match=r"should have one file instances_train\*\.json.*has none"):
        coco.open_sets(tmp_path_factory.mktemp("empty"), cfg())
    (folder / "train2017/20.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images are missing below .*first '20\.png'"):
        coco.open_sets(folder, cfg())
    save(torch.zeros(3, 24, 16, dtype=torch.uint8), folder / "train2017/20.png")
    with pytest.raises(ValueError, match=r"20\.png has 16 x 24 pixels upright, but 24 x 16 in"):
        coco.open_sets(folder, cfg())
    found = described()
    found["categories"].append({"id": 9, "name": "cow"})
    write(folder, found, "val")
    with pytest.raises(ValueError, match=r"has 2 categories, and .* 3 or of other names"):
        coco.open_sets(folder, cfg())
    write(folder, described(), "train2014_")
    with pytest.raises(ValueError, match="has several, instances_train2014_2017"):
        coco.open_sets(folder, cfg())


def test_a_broken_image_cannot_be_read(folder: Path) -> None:
    (folder / "val2017/30.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"30\.png is not a JPEG, PNG"):
        coco.open_sets(folder, cfg())["val"].read(0)
    found = described()
    found["annotations"][3]["segmentation"] = CROWD | {"counts": [1, 2]}
    write(folder, found, "val")
    with pytest.raises(UnreadableImage, match=r"20\.png has run lengths that do not fill"):
        coco.open_sets(folder, cfg())["val"].read(1)
