"""A folder becomes the same index everywhere, or a sentence that says why not."""

from __future__ import annotations

import os

import numpy as np
import pytest

from unic_ds.data import scan, split


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def test_names_are_sorted_and_classes_are_first_folders(tmp_path):
    touch(tmp_path, "b/2.JPG", "a/deep/er/1.png", "b/1.jpeg", "top.webp", "a/x.bmp")
    touch(tmp_path, "a/notes.txt", "b/1.gif", "c/readme.md", ".jpg.part")
    source = scan(tmp_path)
    assert list(source.names) == ["a/deep/er/1.png", "a/x.bmp", "b/1.jpeg", "b/2.JPG", "top.webp"]
    assert source.classes == ("a", "b")
    assert source.label_N.tolist() == [0, 0, 1, 1, -1]
    assert len(source) == 5
    assert source.read(3).tobytes() == b"b/2.JPG"


def test_a_flat_folder_has_no_classes(tmp_path):
    source = scan(touch(tmp_path, "1.jpg", "2.jpg"))
    assert source.classes == ()
    assert source.label_N.tolist() == [-1, -1]


def test_links_are_followed_and_loops_are_not(tmp_path):
    data = touch(tmp_path / "data", "a/1.jpg", "a/2.jpg")
    touch(tmp_path / "elsewhere", "3.jpg")
    (data / "b").symlink_to(tmp_path / "elsewhere")
    (data / "a" / "4.jpg").symlink_to(tmp_path / "elsewhere" / "3.jpg")
    (data / "a" / "loop").symlink_to(data)
    (data / "a" / "broken.jpg").symlink_to(tmp_path / "nothing.jpg")
    source = scan(data)
    assert list(source.names) == ["a/1.jpg", "a/2.jpg", "a/4.jpg", "b/3.jpg"]
    assert source.read(2).tobytes() == b"3.jpg"


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="do not exist"):
        scan(tmp_path / "missing")
    with pytest.raises(ValueError, match="is no source of images"):
        scan(tmp_path / "file")
    with pytest.raises(ValueError, match=r"no \.jpg.* below"):
        scan(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"--data\.train"):
        scan("")


def test_fingerprint_is_of_the_names_not_of_the_place(tmp_path):
    one = scan(touch(tmp_path / "one", "a/1.jpg", "a/2.jpg"))
    two = scan(touch(tmp_path / "two", "a/1.jpg", "a/2.jpg"))
    three = scan(touch(tmp_path / "three", "a/1.jpg", "a/3.jpg"))
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != three.fingerprint()
    assert one.fingerprint() != one.subset([0]).fingerprint()


def test_split_is_by_name_so_adding_images_moves_none(tmp_path):
    names = [f"{c}/{i}.jpg" for c in "ab" for i in range(200)]
    before = [set(side.names) for side in split(scan(touch(tmp_path, *names)), 0.25, seed=0)]
    touch(tmp_path, *[f"c/{i}.jpg" for i in range(100)], "a/\udcff.jpg")
    after = [set(side.names) for side in split(scan(tmp_path), 0.25, seed=0)]
    assert before[0] < after[0] and before[1] < after[1]
    assert not after[0] & after[1]
    assert len(after[0] | after[1]) == 501
    assert 75 < len(before[1]) < 125  # 100 expected, standard deviation 8.7
    assert set(split(scan(tmp_path), 0.25, seed=1)[1].names) != after[1]


def test_split_keeps_labels_and_refuses_an_empty_side(tmp_path):
    source = scan(touch(tmp_path, *[f"{c}/{i}.jpg" for c in "ab" for i in range(20)]))
    for side in split(source, 0.5, seed=3):
        assert [name[0] for name in side.names] == [side.classes[k] for k in side.label_N]
    train, val = split(source, 0.0, seed=3)
    assert (len(train), len(val)) == (40, 0)
    with pytest.raises(ValueError, match="leaves none for validation"):
        split(source.subset([0]), 1e-6, seed=0)
    with pytest.raises(ValueError, match="leaves none for training"):
        split(source.subset([0]), 1 - 1e-6, seed=0)


def test_subset_keeps_the_order_asked_for(tmp_path):
    source = scan(touch(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.jpg"))
    subset = source.subset(np.array([2, 0]))
    assert list(subset.names) == ["b/3.jpg", "a/1.jpg"]
    assert subset.label_N.tolist() == [1, 0]
    assert subset.read(0).tobytes() == b"b/3.jpg"


def test_validation_folders_take_the_training_labels(tmp_path):
    for side, classes in (("train", "abc"), ("val", "bc"), ("odd", "cd")):
        for name in classes:
            (tmp_path / side / name).mkdir(parents=True)
            (tmp_path / side / name / "x.jpg").write_bytes(b"x")
    (tmp_path / "val" / "loose.jpg").write_bytes(b"x")
    train, val = scan(tmp_path / "train"), scan(tmp_path / "val")
    named = dict(zip(val.names, val.relabelled(train.classes).label_N.tolist(), strict=True))
    assert named == {"b/x.jpg": 1, "c/x.jpg": 2, "loose.jpg": -1}
    with pytest.raises(ValueError, match="has class folder 'd', which the training images lack"):
        scan(tmp_path / "odd").relabelled(train.classes)
