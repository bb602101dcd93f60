"""Training images and test folders beside them: subsets, ImageNet's numbers, real images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from pictures import encode, folder, photo
from timm.data import ImageNetInfo

from unic_ds import config
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import pixels_model
from unic_ds.evaluate.registry import evaluate_models
from unic_ds.evaluate.robustness import matched, real_labels
from unic_ds.harness import layouts

CFG = config.Config(data=config.Data(threads=1))
SYNSETS = ImageNetInfo().label_names()


def test_test_sets_of_some_classes_are_measured_by_one_probe(tmp_path: Path) -> None:
    folder(tmp_path / "train", 24, classes=4)
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    shutil.copytree(tmp_path / "train", tmp_path / "sketch")
    for name in ("class_0", "class_2"):
        shutil.rmtree(tmp_path / "sketch" / name)
    sets = layouts.open_sets("robustness", tmp_path, CFG)
    assert list(sets) == ["train", "sketch", "val"]
    assert sets["sketch"].classes == ("class_1", "class_3")
    data = EvalData(sets, options=CFG.eval, seed=0, device=torch.device("cpu"))
    scores = evaluate_models([pixels_model(48)], data, ["robustness"])
    assert [score.name for score in scores] == ["robustness sketch", "robustness val"]
    assert scores[0].protocol.endswith("among 2 of 4 classes 24/12 images 48 px")
    (linear,) = evaluate_models([pixels_model(48)], data, ["linear"])
    assert scores[1].value == linear.value > 50 and scores[0].value > 75


def test_imagenet_v2_has_numbers_and_val_has_real_labels(tmp_path: Path) -> None:
    image = tmp_path / "image.jpg"
    image.write_bytes(encode(photo(32, 32)).tobytes())
    root = tmp_path / "imagenet"
    files = [f"train/{name}/0.JPEG" for name in SYNSETS]
    files += [f"v2/{number}/0.jpeg" for number in (0, 2, 10, 999)]
    files += [f"val/{SYNSETS[i]}/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(3)]
    for name in files:
        (root / name).parent.mkdir(parents=True)
        os.link(image, root / name)
    sets = layouts.open_sets("robustness", root, CFG)
    train, v2, val = sets["train"], sets["v2"], sets["val"]
    label_M, wanted_M = matched("v2", v2, train)
    of_place = [(v2.file_name(i), label_M[v2.source.label_N[i]].item()) for i in range(4)]
    assert sorted(of_place) == sorted((f"{i}/0.jpeg", i) for i in (0, 2, 10, 999))
    assert wanted_M.tolist() == [0, 2, 10, 999]
    real = real_labels(val, train)
    assert real is not None and (real[0], real[1]) == ([], [970, 795])  # timm's first
    assert real_labels(v2, train) is None


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "train", 8)
    with pytest.raises(ValueError, match="wants a folder train/ of class folders, and beside it"):
        layouts.open_sets("robustness", tmp_path, CFG)
    folder(tmp_path / "other", 9, classes=3)
    with pytest.raises(ValueError, match="other' has class folder 'class_2', which the training"):
        layouts.open_sets("robustness", tmp_path, CFG)
    shutil.rmtree(tmp_path / "other")
    folder(tmp_path / "other", 3, classes=1)
    with pytest.raises(ValueError, match="other' has 1 class folders with images; put the images"):
        layouts.open_sets("robustness", tmp_path, CFG)
