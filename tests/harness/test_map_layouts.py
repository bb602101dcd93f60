"""ADE20K's, VOC's and NYU's layouts, built file by file; what is wrong with one is a sentence."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_sets import CLASSES, METRES, class_maps, coloured, one_hot, token_model
from hostile_inputs import harmed_bytes
from memory_sets import scores_of
from pictures import encode
from PIL import Image
from torch import Tensor

from unic_ds.config import Config, Data, Eval
from unic_ds.evaluate.samples import IGNORED, UnreadableImage
from unic_ds.harness import layouts
from unic_ds.harness.layouts import map_files

CFG = Config(data=Data(train="."), eval=Eval(max_train=0, max_val=0))


def save(file: Path, value: np.ndarray, **options: Any) -> None:
    """Write an array as an image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(value).save(file, **options)


def save_image(file: Path, class_HW: Tensor) -> None:
    save(file, coloured(class_HW).permute(1, 2, 0).numpy())


def ade20k(folder: Path, count: int = 3) -> list[Tensor]:
    """ADE20K's layout with three classes of its own; the maps of both splits alike."""
    maps = class_maps(count, 20, 30, block=10)
    for split in ("training", "validation"):
        for i, class_HW in enumerate(maps):
            save_image(folder / "images" / split / f"{i}.png", class_HW)
            mask_HW = class_HW.numpy() + 1
            mask_HW[0] = 0
            save(folder / "annotations" / split / f"{i}.png", mask_HW)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return maps


def voc(folder: Path) -> list[Tensor]:
    """VOC's layout: palette files, of which the lists name some."""
    maps = class_maps(4, 20, 30, block=10)
    for i, class_HW in enumerate(maps):
        save_image(folder / "JPEGImages" / f"2007_{i}.jpg", class_HW)
        mask = Image.fromarray(np.where(np.arange(30) == 0, 255, class_HW.numpy()).astype(np.uint8))
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        (folder / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(folder / "SegmentationClass" / f"2007_{i}.png")
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_2\n2007_1\n")
    (lists / "val.txt").write_text("2007_3\n")
    return maps


def nyu(folder: Path, *, lists: bool) -> list[Tensor]:
    """NYU's layout: with BTS's lists, or as folders."""
    maps = class_maps(4, 20, 30, block=10)
    folder.mkdir(exist_ok=True)
    for i, class_HW in enumerate(maps):
        image, depth = f"images/{i}.png", f"depth/{i}.png"
        root = folder / ("train" if i < 3 else "test")
        if lists:
            image, depth = f"kitchen_1/rgb_{i}.png", f"kitchen_1/sync_depth_{i}.png"
            root = folder / ("sync" if i < 3 else "official_splits/test")
            name = "nyu_train_files.txt" if i < 3 else "nyu_test_files.txt"
            with (folder / name).open("a") as file:
                file.write(f"/{image} /{depth} 518.8579\n/{image} None 518.8579\n")
        save_image(root / image, class_HW)
        save(root / depth, (METRES[class_HW.long()].numpy() * 1000).astype(np.uint16))
    return maps


def test_ade20k_has_classes_from_1_and_ignores_0(tmp_path: Path) -> None:
    maps = ade20k(tmp_path)
    sets = layouts.open_sets("segmentation", tmp_path, CFG)
    assert sets["train"].classes == CLASSES and len(sets["train"]) == len(sets["val"]) == 3
    for i, class_HW in enumerate(maps):
        image_3HW, mask_HW = sets["val"].read(i)
        assert torch.equal(image_3HW, coloured(class_HW))
        assert (mask_HW[0] == IGNORED).all() and torch.equal(mask_HW[1:], class_HW[1:])
    before = sets["val"].identity
    (tmp_path / "annotations/validation/0.png").touch()
    masks = layouts.open_sets("segmentation", tmp_path, CFG)["val"].identity
    (tmp_path / "classes.txt").write_text("\n".join([*CLASSES, "more"]))
    names = layouts.open_sets("segmentation", tmp_path, CFG)["val"].identity
    assert len({before, masks, names}) == 3
    (tmp_path / "classes.txt").unlink()
    assert len(layouts.open_sets("segmentation", tmp_path, CFG)["val"].classes) == 150
    small = Config(data=Data(train="."), eval=Eval(max_train=2, max_val=1))
    assert list(map(len, layouts.open_sets("segmentation", tmp_path, small).values())) == [2, 1]


def test_voc_has_palettes_and_lists(tmp_path: Path) -> None:
    maps = voc(tmp_path)
    sets = layouts.open_sets("segmentation", tmp_path, CFG)
    assert len(sets["val"].classes) == 21
    for name, places in (("train", (2, 1)), ("val", (3,))):
        assert len(sets[name]) == len(places)
        for i, place in enumerate(places):
            image_3HW, mask_HW = sets[name].read(i)
            assert (mask_HW[:, 0] == IGNORED).all()
            assert torch.equal(mask_HW[:, 1:], maps[place][:, 1:])
            assert (image_3HW.float() - coloured(maps[place])).abs().mean() < 20  # a JPEG
    assert sets["train"].identity != sets["val"].identity


@pytest.mark.parametrize("lists", [True, False])
def test_nyu_has_depth_in_mm(tmp_path: Path, lists: bool) -> None:
    maps = nyu(tmp_path, lists=lists)
    sets = layouts.open_sets("depth", tmp_path, CFG)
    assert list(map(len, sets.values())) == [3, 1]
    for i, class_HW in enumerate(maps):
        image_3HW, depth_HW = sets["train"].read(i) if i < 3 else sets["val"].read(0)
        assert torch.equal(image_3HW, coloured(class_HW))
        assert torch.equal(depth_HW, METRES[class_HW.long()]) and depth_HW.dtype == torch.float32


def test_a_folder_on_the_disk_is_measured_and_a_cut_image_is_left_out(
    tmp_path: Path, capsys: Any
) -> None:
    ade20k(tmp_path, 6)
    broken = tmp_path / "images/validation/3.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    sets = layouts.open_sets("segmentation", tmp_path, CFG)
    with pytest.raises(UnreadableImage, match=re.escape(str(broken))):
        sets["val"].read(3)
    model = token_model("mask", 10, 1, one_hot)
    options = Eval(head_images=320, size=10, batch=4)
    iou, accuracy = scores_of("segmentation", [model], sets, options)
    assert iou.value > 90 and accuracy.value > 95
    assert "6/5 images" in iou.protocol
    assert f"1 of 6 images of {tmp_path.name} are left out:" in capsys.readouterr().out


def refused(task: str, folder: Path) -> str:
    """The sentence by which a folder is refused."""
    with pytest.raises(ValueError) as error:
        layouts.open_sets(task, folder, CFG)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_mistakes_in_masks_are_one_sentence(tmp_path: Path) -> None:
    ade20k(tmp_path)
    mask = tmp_path / "annotations/validation/1.png"
    save(mask, np.ones((20, 31), np.uint8))
    assert "1.png' has 31 x 20 pixels, and its image 30 x 20; make" in refused(
        "segmentation", tmp_path
    )
    save(mask, np.ones((20, 30, 3), np.uint8))
    assert "is a PNG of mode RGB; save it as a PNG of one channel of 8 bits" in refused(
        "segmentation", tmp_path
    )
    save(mask, np.ones((20, 30), np.uint8), format="JPEG")
    assert "is a JPEG of mode L" in refused("segmentation", tmp_path)
    mask.unlink()
    assert "1 of 6 images and maps are missing below" in refused("segmentation", tmp_path)
    for file in (tmp_path / "images/validation").iterdir():
        file.unlink()
    assert "has no image in one of its splits" in refused("segmentation", tmp_path)
    assert "has no masks; name a folder with images/{training" in refused(
        "segmentation", tmp_path / "images"
    )
    (tmp_path / "classes.txt").write_text("one\n")
    assert "names 1 classes; write 2 to 255" in refused("segmentation", tmp_path)


def test_a_class_beyond_the_set_s_is_one_sentence(tmp_path: Path) -> None:
    ade20k(tmp_path)
    save(tmp_path / "annotations/training/0.png", np.full((20, 30), 5, np.uint8))
    sets = layouts.open_sets("segmentation", tmp_path, CFG)
    model = token_model("mask", 10, 1, one_hot)
    with pytest.raises(RuntimeError, match=r"0\.png has class 5 beyond the 3 of the set; name all"):
        scores_of("segmentation", [model], sets, Eval(head_images=32, size=10))
    (tmp_path / "annotations/validation/0.png").write_bytes(b"")
    assert len(layouts.open_sets("segmentation", tmp_path, CFG)["val"]) == 3
    save(tmp_path / "annotations/validation/2.png", np.full((20, 30), 4, np.uint8))
    assert "validation/2.png has class 4 beyond the 3 of the set; name all in classes.txt" in (
        refused("segmentation", tmp_path)
    )


def test_mistakes_in_lists_and_depth_maps_are_one_sentence(tmp_path: Path) -> None:
    voc(tmp_path / "voc")
    train = tmp_path / "voc/ImageSets/Segmentation/train.txt"
    train.write_text("../../2007_1\n")
    assert "names '../../2007_1', which is no name of an image" in refused(
        "segmentation", tmp_path / "voc"
    )
    train.unlink()
    assert "train.txt' cannot be read (No such file" in refused("segmentation", tmp_path / "voc")
    nyu(tmp_path / "nyu", lists=True)
    save(tmp_path / "nyu/sync/kitchen_1/sync_depth_1.png", np.ones((20, 30), np.uint8))
    assert "of mode L; save it as a PNG of one channel of 16 bits" in refused(
        "depth", tmp_path / "nyu"
    )
    (tmp_path / "nyu/nyu_train_files.txt").write_text("a.png ../b.png 5\n")
    assert "line 1 of" in refused("depth", tmp_path / "nyu")
    (tmp_path / "nyu/train_dense.txt").write_text("")
    assert "has several lists of a split, nyu_train_files.txt, train_dense.txt; keep one" in (
        refused("depth", tmp_path / "nyu")
    )
    assert "has no depth maps; name a folder with BTS's lists" in refused("depth", tmp_path)


def test_hostile_maps_are_values_or_a_reason() -> None:
    """Bytes that are changed at random: no exception but ValueError leaves the decoder."""
    harm = random.Random(0)
    wholes = [
        (encode(Image.fromarray(np.arange(600, dtype=kind).reshape(20, 30)), "PNG"), modes)
        for kind, modes in ((np.uint8, map_files.BITS_8), (np.uint16, map_files.BITS_16))
    ]
    reasons = set()
    for _ in range(300):
        whole, modes = harm.choice(wholes)
        try:
            found = map_files.decode_map(
                np.frombuffer(harmed_bytes(whole.tobytes(), harm), np.uint8), Data(train="."), modes
            )
            assert found.ndim == 2
        except ValueError as error:
            reasons.add(str(error))
    assert len(reasons) > 5
