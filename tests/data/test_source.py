"""Folders and lists give the same samples everywhere, or a clear error."""

from __future__ import annotations

import os

import numpy as np
import pytest
from pictures import encode, photo

from unic_ds.config import Config, Data
from unic_ds.data import scan, split
from unic_ds.data.reader import Reader
from unic_ds.training import teacher_check


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


def test_hidden_names_are_no_images_and_other_files_are_counted(tmp_path, capsys):
    touch(tmp_path, "c0/1.jpg", "c0/2.jfif", "c1/3.JPE", "c1/.4.jpg", ".5.jpg", "6.jpg")
    touch(
        tmp_path,
        ".ipynb_checkpoints/7.jpg",
        "c0/.thumbs/8.jpg",
        "__MACOSX/c0/._1.jpg",
        "c0/._1.jpg",
    )
    touch(tmp_path, "c0/9.tif", "c1/9.TIF", "c1/9.gif", "c1/9.h\nic", "README")
    os.mkfifo(tmp_path / "pipe.jpg")
    source = scan(tmp_path)
    assert list(source.names) == ["6.jpg", "c0/1.jpg", "c0/2.jfif", "c1/3.JPE"]
    assert source.classes == ("c0", "c1")
    skipped, unlabelled = capsys.readouterr().out.splitlines()
    assert skipped == (
        f"{tmp_path}: 12 files were skipped: 2 .tif, 1 without an ending, 1 .gif, 1 .h\\nic,"
        " 6 hidden (a dot first, or __MACOSX), 1 not regular"
    )
    assert unlabelled.startswith(f"{tmp_path}: 1 of 4 images have no class")
    with pytest.raises(ValueError, match=r"no \.jpg.* \(1 file was skipped: 1 hidden"):
        scan(touch(tmp_path / "c2", ".a.jpg"))


def test_a_verb_that_prints_json_prints_nothing_else(tmp_path, capsys):
    (touch(tmp_path, "notes.md") / "1.jpg").write_bytes(encode(photo()).tobytes())
    teacher_check.images_to_compare(Config(data=Data(train=str(tmp_path), backend="torch")))
    said = capsys.readouterr()
    assert said.out == "" and "1 file was skipped: 1 .md" in said.err


def test_a_folder_is_listed_once_and_names_choose_its_path(tmp_path, capsys):
    """Links that fan out, two a level, would lead to two to the power of 40 images."""
    for root, names in ((tmp_path / "1", "ab"), (tmp_path / "2", "ba")):
        touch(root, "z/real/0.jpg", "dead/1.jpg")
        (root / "dead" / "c").symlink_to("c")
        (root / "dead" / "x.jpg").symlink_to("x.jpg")
        (root / "dead" / "y.jpg").symlink_to("nothing")
        (root / "a").symlink_to(root / "z" / "real")
        for level in range(40):
            touch(tmp_path, f"fan{level}/{level}.jpg")
            for name in names:
                link = (root if level == 0 else tmp_path / f"fan{level - 1}") / f"to_{name}"
                if not link.is_symlink():
                    link.symlink_to(tmp_path / f"fan{level}")
    found = [list(scan(tmp_path / side).names) for side in "12"]
    down = ["to_a/" * (level + 1) + f"{level}.jpg" for level in range(40)]
    assert found[0] == found[1] == sorted(["dead/1.jpg", *down, "z/real/0.jpg"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    for line in said:
        assert "44 files were skipped: 41 linked to a folder that is listed already" in line
        assert "3 linked to nothing" in line


def test_folders_may_lie_deep(tmp_path):
    deep = touch(tmp_path, "0.jpg")
    for _ in range(1050):
        deep = deep / "d"
        deep.mkdir()
    try:
        assert list(scan(touch(tmp_path, "d/1.jpg")).names) == ["0.jpg", "d/1.jpg"]
    finally:  # pytest would remove it recursively
        (tmp_path / "d" / "1.jpg").unlink()
        os.removedirs(deep)


LISTS = {
    "as it was": (b"a/1.jpg\nb/2.jpg\tcat\n", [("a/1.jpg", "a"), ("b/2.jpg", "cat")]),
    "of windows": (b"\xef\xbb\xbfa/1.jpg\r\n\r\n2.jpg \t\r\n", [("a/1.jpg", "a"), ("2.jpg", "")]),
    "of caffe": (
        b"n01/n01_1.JPEG 0\nval 2.JPEG  17 \n",
        [("n01/n01_1.JPEG", "0"), ("val 2.JPEG", "17")],
    ),
    "words": (b"1.jpg cat\n/x/y/my cat 2.png\n", [("1.jpg", "cat"), ("/x/y/my cat 2.png", "y")]),
    "blanks in names": (
        b"a b/c 1\nd.jpg e.jpg\nf.jpg 2\t\n",
        [("a b/c 1", "a b"), ("d.jpg e.jpg", ""), ("f.jpg 2", "")],
    ),
    "odd characters": (
        "a\u2028b\x0bc\x85d.jpg\ne.jpg\tf\u2029g\n".encode() + b"h\xff.jpg",
        [("a\u2028b\x0bc\x85d.jpg", ""), ("e.jpg", "f\u2029g"), ("h\udcff.jpg", "")],
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_read_as_people_write_it(name, tmp_path):
    text, rows = LISTS[name]
    (tmp_path / "list.txt").write_bytes(text)
    source = scan(tmp_path / "list.txt")
    classes = [source.classes[k] if k >= 0 else "" for k in source.label_N]
    assert list(zip(source.names, classes, strict=True)) == rows


@pytest.mark.parametrize(
    "text, wrong",
    [
        (b"1.jpg\n2\0.jpg\n", "line 2 .* has a zero byte"),
        ("1.jpg\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (
            b"1.jpg\tn01\t0\t32\n",
            r"line 1 .* is '1\.jpg\\tn01\\t0\\t32'; a line of a list is a path",
        ),
        (b"1.jpg\n\tn01\n", "line 2 .* a line of a list is a path"),
        (b"1.jpg" * 20_000, "line 1 .* has more than 65536 bytes"),
        (b"../1.jpg 3\n", "line 1 .* leaves the list's folder"),
        (b" \r\n", "names no image"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(text, wrong, tmp_path):
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(ValueError, match=wrong) as said:
        scan(tmp_path / "list.txt")
    assert "\n" not in str(said.value)


def test_a_list_names_what_is_no_image(tmp_path, capsys):
    """Devices, pipes, folders and huge files are replaced, without cost in time or memory."""
    touch(tmp_path, "folder/1.gif")
    (tmp_path / "good.jpg").write_bytes(encode(photo()).tobytes())
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(1 << 40)
    odd = [
        "/dev/zero",
        "/proc/kmsg",
        "/proc/kcore",
        "pipe.jpg",
        "folder",
        "folder/1.gif",
        "sparse.jpg",
    ]
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in ["good.jpg", *odd]))
    source = scan(tmp_path / "list.txt")
    line = capsys.readouterr().out.splitlines()[0]
    assert "5 of 8 lines end in none of .jpg" in line
    assert "(4 without an ending, 1 .gif)" in line
    reader = Reader(source, Data(bad_limit=1))
    assert {reader.read(i).index for i in range(8)} == {0}
    bad = dict(reader.listed())
    assert bad.keys() == set(odd)
    assert (
        bad["/dev/zero"]
        == bad["pipe.jpg"]
        == bad["folder"]
        == "cannot be read (is not a regular file)"
    )
    assert bad["sparse.jpg"] == "has 1099511627776 bytes, more than data.max_mb 256"
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"cannot be read \(is not a regular file\)"):
        scan(tmp_path / "pipe.txt")


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
    with pytest.raises(ValueError, match="has class folder 'd', which the training images do not"):
        scan(tmp_path / "odd").relabelled(train.classes)
