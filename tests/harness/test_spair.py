"""SPair-71k's layout: what is read, and what is refused before an image is decoded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_samples import save

from unic_ds.config import Config, Eval
from unic_ds.evaluate.samples import UnreadableImage
from unic_ds.harness.layouts import spair

pytestmark = pytest.mark.filterwarnings("error")

NAMES = ("000001-a-b:cat", "000002-b-a:cat", "000003-c-c:dog")
ANNOTATION = {
    "src_imname": "a.png",
    "trg_imname": "b.png",
    "category": "cat",
    "src_kps": [[1, 2], [5, 9]],
    "trg_kps": [[3, 4], [7, 8]],
    "trg_bndbox": [1, 2, 11, 8],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pairs of three images, of which one is broken."""
    draw = torch.Generator().manual_seed(0)
    for place, (name, width) in enumerate({"cat/a": 20, "cat/b": 30, "dog/c": 10}.items()):
        image_3HW = torch.randint(256, (3, 12, width), generator=draw, dtype=torch.uint8)
        save(image_3HW, tmp_path / f"JPEGImages/{name}.png")
        annotate(tmp_path, NAMES[place])
    annotate(tmp_path, NAMES[2], category="dog", src_imname="c.png", trg_imname="c.png")
    return tmp_path


def annotate(folder: Path, name: str, **changed: Any) -> None:
    """Write the annotation of a pair."""
    file = folder / f"PairAnnotation/test/{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ANNOTATION | changed))


def listed(folder: Path, *names: str) -> None:
    """Write the list of the test pairs."""
    (folder / "Layout/large").mkdir(parents=True)
    (folder / "Layout/large/test.txt").write_text("".join(f"{name}\n" for name in names))


def cfg(**options: int) -> Config:
    return replace(Config(), eval=Eval(**options))


def test_pairs_are_read(folder: Path) -> None:
    pairs = spair.open_sets(folder, cfg())["val"]
    assert len(pairs) == 3 and pairs.classes == ("cat", "dog")
    assert pairs.annotations == {"keypoints"} and pairs.name == folder.name
    pair = pairs.read(0)
    assert pair.source_3HW.shape == (3, 12, 20) and pair.target_3HW.shape == (3, 12, 30)
    assert pair.source_K2.tolist() == [[1, 2], [5, 9]]
    assert pair.target_K2.tolist() == [[3, 4], [7, 8]]
    assert pair.target_box_4.tolist() == [1, 2, 11, 8] and pair.category == "cat"
    before = pairs.identity
    (folder / "JPEGImages/cat/a.png").touch()
    touched = spair.open_sets(folder, cfg())["val"].identity
    assert touched != before
    annotate(folder, NAMES[0], trg_kps=[[3, 4], [7, 9]])
    moved = spair.open_sets(folder, cfg())["val"].identity
    annotate(folder, NAMES[0], trg_bndbox=[1, 2, 11, 9])
    assert len({touched, moved, spair.open_sets(folder, cfg())["val"].identity}) == 3
    annotate(folder, NAMES[0])
    assert spair.open_sets(folder, cfg())["val"].identity == touched


def test_a_broken_link_has_an_identity(folder: Path) -> None:
    """It is left out when it is read."""
    image = folder / "JPEGImages/cat/b.png"
    before = spair.open_sets(folder, cfg())["val"].identity
    image.unlink()
    image.symlink_to(folder / "gone.png")
    pairs = spair.open_sets(folder, cfg())["val"]
    assert pairs.identity not in ("", before)
    with pytest.raises(UnreadableImage, match=r"b\.png cannot be read"):
        pairs.read(0)


def test_the_list_and_the_limit_choose_pairs(folder: Path) -> None:
    listed(folder, NAMES[2], NAMES[0])
    pairs = spair.open_sets(folder, cfg())["val"]
    assert [pair.category for pair in pairs.pairs] == ["dog", "cat"]
    assert len(spair.open_sets(folder, cfg(max_val=1))["val"]) == 1


def test_a_pair_with_a_broken_image_cannot_be_read(folder: Path) -> None:
    (folder / "JPEGImages/cat/b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    annotate(folder, NAMES[2], category="dog", src_imname="c.png", trg_imname="c.png")
    pairs = spair.open_sets(folder, cfg())["val"]
    with pytest.raises(UnreadableImage, match=r"cat/b\.png has a header that cannot be read"):
        pairs.read(0)
    annotate(folder, NAMES[0], src_kps=[[1, 2], [21, 2]])
    with pytest.raises(UnreadableImage, match=r"a\.png has 20 x 12 pixels, and a keypoint out"):
        spair.open_sets(folder, cfg())["val"].read(0)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"src_imname": "../a.png"}, "src_imname '../a.png' is no name"),
        ({"category": "/etc"}, "category '/etc' is no name"),
        ({"trg_kps": [[3, 4]]}, "src_kps has 2 points, trg_kps 1"),
        ({"src_kps": [[3, 4, 5]]}, "src_kps is no list of 2 numbers each"),
        ({"src_kps": [[3, float("nan")]]}, "src_kps has no numbers, or some that are not finite"),
        ({"trg_kps": None}, "trg_kps"),
        ({"trg_bndbox": [5, 5, 5, 9]}, "is no box x0, y0, x1, y1"),
    ],
)
def test_a_wrong_annotation_is_named(folder: Path, changed: dict[str, Any], says: str) -> None:
    annotate(folder, NAMES[1], **changed)
    with pytest.raises(ValueError, match=r"000002-b-a:cat.json' is no pair") as error:
        spair.open_sets(folder, cfg())
    assert says in str(error.value)


def test_another_layout_is_refused(folder: Path, tmp_path_factory: Any) -> None:
    with pytest.raises(ValueError, match=r"no pair in .*name the folder of SPair-71k"):
        spair.open_sets(tmp_path_factory.mktemp("empty"), cfg())
    (folder / "JPEGImages/dog/c.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images are missing .*first 'dog/c.png'"):
        spair.open_sets(folder, cfg())
    listed(folder, NAMES[0], "000009-x-y:cat")
    with pytest.raises(ValueError, match=r"1 of 2 pairs of .*first '000009-x-y:cat.json'"):
        spair.open_sets(folder, cfg())
    (folder / f"PairAnnotation/test/{NAMES[0]}.json").write_text("[" * 100_000)
    (folder / "Layout/large/test.txt").write_text(NAMES[0])
    with pytest.raises(ValueError, match="nested too deeply"):
        spair.open_sets(folder, cfg())
