"""Composed sets: exact annotations, splits without common stamps, the same bytes each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import composed_sets
import numpy as np
import pytest
from composed_coco import nuclei, outlines, run_lengths
from composed_scenes import SMALL, scene, views
from PIL import Image
from stamps import SHAPES, classes, drawn, of_split

SCRIPT = Path(composed_sets.__file__)
COUNTS = {"train": SMALL.train, "val": SMALL.val}
SPLITS = tuple(COUNTS)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""pycocotools with numpy 2."""


def pixels(path):
    return np.asarray(Image.open(path))


def instances(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())


def test_the_same_call_writes_the_same_bytes(composed, tmp_path):
    command = [sys.executable, SCRIPT, tmp_path, "--small", "--only", "voc", "coco", "nyu", "spair"]
    subprocess.run(command, check=True, capture_output=True)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(files) > 150
    for path in files:
        assert path.read_bytes() == (composed / path.relative_to(tmp_path)).read_bytes(), path


def test_no_stamp_is_in_both_splits():
    train, val = ({stamp.name for stamp in of_split(split)} for split in SPLITS)
    assert train and val and not train & val
    looks = [{stamp.image.tobytes() for stamp in of_split(split)} for split in SPLITS]
    assert not looks[0] & looks[1]
    for split in SPLITS:
        used = {p.stamp.name for n in range(COUNTS[split]) for p in scene(split, n, SMALL).placed}
        assert used <= (train if split == "train" else val)


def test_drawn_shapes_are_all_different():
    found = drawn()
    assert {stamp.group for stamp in found} == set(SHAPES)
    assert len({stamp.image.tobytes() for stamp in found}) == len(found) == 40 * len(SHAPES)


@pytest.mark.parametrize("split", SPLITS)
def test_ade20k_has_a_class_for_each_solid_pixel(composed, split):
    long = composed_sets.LONG[split]
    masks = sorted((composed / "ade20k" / "annotations" / long).iterdir())
    images = sorted((composed / "ade20k" / "images" / long).iterdir())
    assert len(masks) == COUNTS[split] and [p.stem for p in masks] == [p.stem for p in images]
    seen = set()
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        mask_HW = pixels(mask)
        assert pixels(image).shape == (*mask_HW.shape, 3)
        found = scene(split, number, SMALL)
        solid_HW = np.any([placed.mask_HW for placed in found.placed], 0)
        assert np.array_equal(mask_HW > 0, solid_HW)
        seen |= set(np.unique(mask_HW).tolist())
    assert seen == set(range(len(classes()) + 1))


@pytest.mark.parametrize("split", SPLITS)
def test_voc_agrees_with_ade20k_outside_mixed_pixels(composed, split):
    names = (composed / "voc" / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
    ade = sorted((composed / "ade20k" / "annotations" / composed_sets.LONG[split]).iterdir())
    kept = []
    for name, other in zip(names, ade, strict=True):
        assert (composed / "voc" / "JPEGImages" / f"{name}.jpg").is_file()
        mask = Image.open(composed / "voc" / "SegmentationClass" / f"{name}.png")
        mask_HW, kept_HW = np.asarray(mask), np.asarray(mask) != 255
        assert mask.mode == "P" and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        assert np.array_equal(mask_HW[kept_HW], pixels(other)[kept_HW])
        kept.append(kept_HW.mean())
    assert 0.5 < np.mean(kept) < 1


@pytest.mark.parametrize("name", ["coco", "microscopy"])
@pytest.mark.parametrize("split", SPLITS)
def test_boxes_areas_and_masks_of_coco_agree(composed, name, split):
    decoder = pytest.importorskip("pycocotools.mask")
    if name == "microscopy" and nuclei() is None:
        pytest.skip("stardist is not installed (eval-packages.txt)")
    found = instances(composed / name, split)
    ids = {row["id"] for row in found["categories"]}
    for row in found["images"]:
        with Image.open(composed / name / f"{split}2017" / row["file_name"]) as image:
            assert image.size == (row["width"], row["height"])
        for one in (a for a in found["annotations"] if a["image_id"] == row["id"]):
            shape = one["segmentation"]
            as_runs = decoder.frPyObjects(shape, row["height"], row["width"])
            mask_HW = decoder.decode(decoder.merge(as_runs) if isinstance(shape, list) else as_runs)
            x, y, w, h = one["bbox"]
            assert mask_HW.sum() == mask_HW[y : y + h, x : x + w].sum() == one["area"] > 0
            edges = (mask_HW[y, :], mask_HW[y + h - 1, :], mask_HW[:, x], mask_HW[:, x + w - 1])
            assert all(edge.any() for edge in edges)
            assert one["category_id"] in ids


def test_polygons_of_coco_are_the_masks_of_the_scenes(composed):
    decoder = pytest.importorskip("pycocotools.mask")
    found = instances(composed / "coco", "val")
    masks = [p.mask_HW for n in range(SMALL.val) for p in scene("val", n, SMALL).placed]
    for one, mask_HW in zip(found["annotations"], masks, strict=True):
        if isinstance(one["segmentation"], list):
            as_runs = decoder.frPyObjects(one["segmentation"], *mask_HW.shape)
            assert np.array_equal(decoder.decode(decoder.merge(as_runs)), mask_HW)


def test_coco_has_polygons_run_lengths_crowds_and_an_empty_image(composed):
    found = instances(composed / "coco", "train")
    assert len(found["images"]) == SMALL.train + 1
    assert {row["id"] for row in found["images"]} > {a["image_id"] for a in found["annotations"]}
    kinds = {(type(a["segmentation"]), a["iscrowd"]) for a in found["annotations"]}
    assert kinds == {(list, 0), (dict, 0), (dict, 1)}


def test_run_lengths_and_outlines_of_a_known_mask():
    mask_HW = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    assert run_lengths(mask_HW)["counts"] == [0, 2, 1, 1, 5]
    (polygon,) = outlines(mask_HW)
    corners = {(0, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0, 2)}
    assert len(polygon) == 12
    assert set(zip(polygon[::2], polygon[1::2], strict=True)) == corners
    assert outlines(np.pad(np.zeros((1, 1), bool), 1, constant_values=True)) is None  # a hole
    assert outlines(np.eye(2, dtype=bool)) is None  # a corner in common


def test_microscopy_has_the_nuclei_of_each_quadrant(composed):
    if nuclei() is None:
        pytest.skip("stardist is not installed (eval-packages.txt)")
    train, val = (instances(composed / "microscopy", split) for split in SPLITS)
    counts = [sum(a["image_id"] == i for a in train["annotations"]) for i in (1, 2, 3)]
    assert [*counts, len(val["annotations"])] == [35, 33, 40, 29]


@pytest.mark.parametrize("name", ["nyu", "photograph"])
def test_depth_is_in_millimetres_at_the_size_of_the_image(composed, name):
    if not (composed / name).is_dir():
        pytest.skip("imgaug is not installed (eval-packages.txt)")
    for split, folder in (("train", "sync"), ("test", "test")):
        lines = (composed / name / f"nyudepthv2_{split}_files_with_gt.txt").read_text().splitlines()
        assert len(lines) >= 4
        for rgb, depth, _ in map(str.split, lines):
            depth_HW = pixels(composed / name / folder / depth.lstrip("/"))
            assert depth_HW.dtype == np.uint16
            assert pixels(composed / name / folder / rgb.lstrip("/")).shape == (*depth_HW.shape, 3)
            known_P = depth_HW[depth_HW > 0]
            assert known_P.min() >= 1000 and known_P.max() <= 6000
            assert len(known_P) > 0.6 * depth_HW.size


def test_keypoints_of_a_pair_are_one_similarity_transform_and_lie_on_the_object():
    for number in range(SMALL.val):
        _, first, second = views("val", number, SMALL)
        a_K2, b_K2 = (seen.point_K2 - seen.point_K2.mean(0) for seen in (first, second))
        # As complex numbers, a similarity transform is a factor.
        a_K, b_K = (x_K2 @ [1, 1j] for x_K2 in (a_K2, b_K2))
        factor = (b_K * a_K.conj()).sum() / (abs(a_K) ** 2).sum()
        assert np.abs(a_K * factor - b_K).max() < 1e-9
        for seen in (first, second):
            column_K, row_K = np.floor(seen.point_K2.T).astype(int)
            assert seen.mask_HW[row_K, column_K].mean() > 0.8  # a rim may blur away


def test_both_views_of_a_stamp_have_its_colours_at_the_keypoints():
    gaps, others = [], []
    for number in range(SMALL.val):
        _, *pair = views("val", number, SMALL)
        colour_2K3 = [
            seen.image_HW3[tuple(np.floor(seen.point_K2.T).astype(int)[::-1])].astype(int)
            for seen in pair
        ]
        gaps.append(np.abs(colour_2K3[0] - colour_2K3[1]).mean())
        others.append(np.abs(colour_2K3[0] - colour_2K3[1][::-1]).mean())
    assert np.mean(gaps) < 0.6 * np.mean(others)


def test_spair_names_images_that_exist(composed):
    folder = composed / "spair"
    pairs = (folder / "Layout" / "large" / "test.txt").read_text().split()
    assert len(pairs) == SMALL.val
    for pair in pairs:
        row = json.loads((folder / "PairAnnotation" / "test" / f"{pair}.json").read_text())
        assert len(row["src_kps"]) == len(row["trg_kps"]) > 0
        for side in ("src", "trg"):
            image = folder / "JPEGImages" / row["category"] / row[f"{side}_imname"]
            assert list(pixels(image).shape) == [SMALL.side, SMALL.side, 3]
            assert row[f"{side}_imsize"] == [SMALL.side, SMALL.side, 3]
            x0, y0, x1, y1 = row[f"{side}_bndbox"]
            assert 0 <= x0 < x1 <= SMALL.side and 0 <= y0 < y1 <= SMALL.side


def test_class_folders_of_both_splits_have_the_same_names_and_other_stamps(composed):
    folders = [composed / "classes", *(composed / "transfer").iterdir()]
    for folder in folders:
        train, val = ({path.name for path in (folder / split).iterdir()} for split in SPLITS)
        assert train == val and len(train) >= 2, folder
    for folder in (composed / "classes", composed / "transfer" / "stamps"):
        # NUMBER_STAMP.jpg below its class
        used = [
            {(path.parent.name, path.stem[5:]) for path in (folder / split).rglob("*.jpg")}
            for split in SPLITS
        ]
        assert not used[0] & used[1]
