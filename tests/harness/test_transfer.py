"""The folder of several data sets: names, groups, real images, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pictures import encode, folder, photo

from unic_ds import config
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import pixels_model
from unic_ds.evaluate.registry import evaluate_models
from unic_ds.harness import layouts

CFG = config.Config(data=config.Data(threads=1))


def sides(where: Path, count: int = 8) -> Path:
    """A set of class folders below train/ and val/, of the same images."""
    for side in ("train", "val"):
        folder(where / side, count)
    return where


def test_sets_and_groups_are_found_in_order(tmp_path: Path) -> None:
    for name in ("pets", "cog/two", "cog/one", ".hidden/x"):
        sides(tmp_path / name)
    (tmp_path / "pets" / "val").rename(tmp_path / "pets" / "test")
    folder(tmp_path / "split", 24)  # without train/ and val/
    sets = layouts.open_sets("transfer", tmp_path, CFG)
    names = ["cog/one", "cog/two", "pets", "split"]
    assert list(sets) == [f"{name}/{side}" for name in names for side in ("train", "val")]
    assert [len(images) for images in sets.values()][:6] == [8] * 6
    assert len(sets["split/train"]) + len(sets["split/val"]) == 24
    assert sets["pets/val"].classes == ("class_0", "class_1")


def test_each_set_has_the_accuracy_that_it_has_alone(tmp_path: Path) -> None:
    sides(tmp_path / "a", 12)
    sides(tmp_path / "group" / "b", 16)
    (tmp_path / "a" / "val" / "class_0" / "broken.jpg").write_bytes(b"no image")

    def scores_of(task: str, where: Path) -> list[Score]:
        sets = layouts.open_sets(task, where, CFG)
        data = EvalData(sets, options=CFG.eval, seed=0, device=torch.device("cpu"))
        return evaluate_models([pixels_model(48)], data, [task])

    (a,), (b,) = (scores_of("linear", tmp_path / name) for name in ("a", "group/b"))
    assert {score.name: score.value for score in scores_of("transfer", tmp_path)} == {
        "transfer a": a.value,
        "transfer group/b": b.value,
        "transfer group mean": b.value,
        "transfer mean": (a.value + b.value) / 2,
    }
    assert a.value > 50 and b.value > 50
    assert a.protocol.endswith(" 12/12 images 48 px")  # the broken one is left out


@pytest.mark.parametrize(
    "change, says",
    [
        ("empty", "has no folders; put each data set into a folder of its own, with train/ and"),
        ("one class", "set 'pets': .*pets' has 1 class folders with training"),
        ("one image", "set 'pets': .*pets' has 1 class folders with training"),
        ("foreign", "set 'pets': .*val' has class folder 'other', which the"),
        ("no images", "set 'pets': no .jpg, .* below .*train'"),
        ("mean", "mean' has the name of a mean; rename the folder"),
        ("held out", "set 'pets': .* has validation images of class 'rare', but no training image"),
    ],
)
def test_a_wrong_set_is_refused(tmp_path: Path, change: str, says: str) -> None:
    root = tmp_path / "sets"
    pets, train = root / "pets", root / "pets" / "train"
    sides(root / "cars")
    sides(pets)
    if change == "empty":
        shutil.rmtree(root)
        root.mkdir()
    elif change == "one class":
        shutil.rmtree(train / "class_1")
        shutil.rmtree(pets / "val" / "class_1")
    elif change == "one image":
        shutil.rmtree(train)
        folder(train, 1)
        shutil.rmtree(pets / "val" / "class_1")
    elif change == "foreign":
        (pets / "val" / "class_1").rename(pets / "val" / "other")
    elif change == "no images":
        shutil.rmtree(train)
        train.mkdir()
    elif change == "mean":
        (root / "cars").rename(root / "group mean")
    else:
        make_held_out(pets)
    with pytest.raises(ValueError, match=says):
        layouts.open_sets("transfer", root, CFG)


def make_held_out(where: Path) -> None:
    """Class folders to be split, one of whose classes is held out as a whole."""
    shutil.rmtree(where)
    folder(where, 20)
    for i in range(30):  # a single image, under the first name that is held out
        rare = where / "rare" / f"{i}.jpg"
        rare.parent.mkdir(exist_ok=True)
        rare.write_bytes(encode(photo()).tobytes())
        val = layouts.class_folders.open_sources(where, CFG.seed)[1]
        if "rare" in {val.classes[label] for label in val.label_N}:
            return
        rare.unlink()
    raise AssertionError("no name is held out")
