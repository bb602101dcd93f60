"""Layouts read composed sets: what comes out is what was composed."""

from __future__ import annotations

import numpy as np
import torch
from composed_scenes import SMALL, depth_scene, scene, views
from stamps import classes

from unic_ds.config import Config
from unic_ds.evaluate.samples import IGNORED
from unic_ds.harness.layouts import open_sets


def opened(task, folder):
    return open_sets(task, folder, Config())


def class_mask(found):
    """Classes from 1 of a scene's pixels, 0: other."""
    mask_HW = np.zeros(found.edge_HW.shape, np.uint8)
    for placed in found.placed:
        mask_HW[placed.mask_HW] = classes().index(placed.stamp.group) + 1
    return torch.from_numpy(mask_HW)


def test_masks_of_ade20k_and_voc(composed):
    ade, voc = (opened("segmentation", composed / name) for name in ("ade20k", "voc"))
    for split in ("train", "val"):
        assert len(ade[split]) == len(voc[split]) == SMALL.count(split)
        for number in range(3):
            found = scene(split, number, SMALL)
            want_HW = class_mask(found)
            reduced_HW = torch.where(want_HW == 0, IGNORED, want_HW.int() - 1)
            assert torch.equal(ade[split].read(number).mask_HW.int(), reduced_HW)
            mask_HW = voc[split].read(number).mask_HW
            edge_HW = torch.from_numpy(found.edge_HW)
            assert torch.equal(mask_HW == IGNORED, edge_HW)
            assert torch.equal(mask_HW[~edge_HW], want_HW[~edge_HW])


def test_depths_of_nyu(composed):
    sets = opened("depth", composed / "nyu")
    for split in ("train", "val"):
        assert len(sets[split]) == SMALL.count(split)
        depths = [depth_scene(split, n, SMALL).depth_HW / 1000 for n in range(SMALL.count(split))]
        known = {depth_HW.astype(np.float32).tobytes() for depth_HW in depths}
        read = {sets[split].read(n).depth_HW.numpy().tobytes() for n in range(len(depths))}
        assert read == known


def test_keypoints_of_spair(composed):
    pairs = opened("correspondence", composed / "spair")["val"]
    assert len(pairs) == SMALL.val
    for number in range(SMALL.val):
        stamp, source, target = views("val", number, SMALL)
        pair = pairs.read(number)
        assert pair.category == stamp.group
        assert np.abs(pair.source_K2.numpy() - source.point_K2).max() < 1e-3
        assert np.abs(pair.target_K2.numpy() - target.point_K2).max() < 1e-3


def test_boxes_and_masks_of_coco(composed):
    sets = opened("detection", composed / "coco")
    for split in ("train", "val"):
        for number in range(SMALL.count(split)):
            placed = scene(split, number, SMALL).placed
            image = sets[split].read(number)
            assert [classes()[c] for c in image.class_M] == [p.stamp.group for p in placed]
            assert image.crowd_M.tolist() == [p.crowd for p in placed]
            assert np.array_equal(image.mask_MHW.numpy(), np.stack([p.mask_HW for p in placed]))
            for (x0, y0, x1, y1), one in zip(image.box_M4.int().tolist(), placed, strict=True):
                assert one.mask_HW[y0:y1, x0:x1].sum() == one.mask_HW.sum()


def test_class_folders(composed):
    sets = opened("linear", composed / "classes")
    assert sets["train"].classes == sets["val"].classes == classes()
    assert len(sets["train"]) == SMALL.train * len(classes())
    found = opened("transfer", composed / "transfer")
    assert {"stamps/train", "stamps/val"} <= set(found)
    assert len(found["stamps/train"].classes) >= 2
