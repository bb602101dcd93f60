"""Tar shards, also those that others wrote, read in place by an index that is built once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tar_shards import shard

from unic_ds.config import data_spec
from unic_ds.data import order, scan
from unic_ds.data.shards import INDEX, MissingShard, OpenFiles
from unic_ds.data.tar_headers import REGULAR, Archive


@pytest.fixture
def written(tmp_path):
    """Three shards as the webdataset library writes them, their samples and classes."""
    samples = {f"{i:04d}": (b"image %d" % i, i % 3) for i in range(20)}
    folder = tmp_path / "shards"
    folder.mkdir()
    pattern = str(folder / "train-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=8, verbose=0) as sink:
        for key, (image, label) in samples.items():
            sink.write({"__key__": key, "jpg": image, "cls": label, "json": {"of": key}})
    return folder, samples


def test_shards_of_the_webdataset_library(written):
    folder, samples = written
    source = scan(folder)
    assert list(source.names) == [f"{key}.jpg" for key in samples]
    assert [source.read(i).tobytes() for i in range(20)] == [image for image, _ in samples.values()]
    assert source.classes == ("0", "1", "2")
    assert source.label_N.tolist() == [label for _, label in samples.values()]
    assert source.groups(2) == (order.SampleGroup(20, (8, 8, 4), 2),)
    assert (folder / INDEX).exists()


def test_one_shard_is_a_source_too(written):
    folder, _ = written
    source = scan(folder / "train-001.tar")
    assert list(source.names) == [f"{i:04d}.jpg" for i in range(8, 16)]


def test_numbers_get_the_names_that_are_listed(written):
    folder, _ = written
    (folder / "classes.txt").write_text("cat\ndog\nowl\n")
    assert scan(folder).classes == ("cat", "dog", "owl")
    (folder / INDEX).unlink()
    (folder / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"'0002\.jpg' has class 2, but classes.txt names 2"):
        scan(folder)
    assert not (folder / INDEX).exists()


def test_members_of_folders_and_other_kinds(tmp_path):
    members = {"a/1.seg.png": b"not it", "a/1.PNG": b"1", "b/x/2.webp": b"2", "readme.txt": b"?"}
    shard(tmp_path / "s.tar", {"a/0.jpeg": b"0"} | members | {"3.cls": b"b\n", "3.jpg": b"3"})
    source = scan(tmp_path)
    assert list(source.names) == ["a/0.jpeg", "a/1.seg.png", "b/x/2.webp", "3.jpg"]
    assert source.classes == ("a", "b") and source.label_N.tolist() == [0, 0, 1, 1]
    half = source.subset([1, 3])
    assert [half.read(i).tobytes() for i in range(2)] == [b"not it", b"3"]


def test_an_index_is_read_not_built_again(written):
    folder, _ = written
    first = scan(folder)
    stamp = (folder / INDEX).stat().st_mtime_ns
    for tar in folder.glob("*.tar"):
        os.utime(tar)  # copied elsewhere: other times, same bytes
    again = scan(folder)
    assert (folder / INDEX).stat().st_mtime_ns == stamp
    assert again.fingerprint() == first.fingerprint()
    assert np.array_equal(again.offset_N, first.offset_N)


def test_an_index_lies_in_the_cache_where_it_cannot_lie_beside(written, tmp_path, monkeypatch):
    folder, _ = written
    long = folder / ("x" * 245 + ".tar")  # its index's name is longer than a file's may be
    (folder / "train-000.tar").rename(long)
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNIC_DS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"neither to .* nor to .*; set UNIC_DS_CACHE to a folder"):
        scan(long)
    monkeypatch.setenv("UNIC_DS_CACHE", str(tmp_path / "cache"))
    assert len(scan(long)) == 8
    (index,) = (tmp_path / "cache" / "indexes").iterdir()
    stamp = index.stat().st_mtime_ns
    assert len(scan(long)) == 8 and index.stat().st_mtime_ns == stamp
    assert [file.suffix for file in sorted(folder.iterdir())] == [".tar"] * 3


def _grow(folder):
    with (folder / "train-001.tar").open("ab") as file:
        file.write(b"\0" * 512)


def _swap(folder):
    data = bytearray((folder / "train-001.tar").read_bytes())
    data[600] ^= 1
    (folder / "train-001.tar").write_bytes(data)


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda f: (f / "train-001.tar").unlink(), "shard 'train-001.tar' is missing from"),
        (lambda f: [tar.unlink() for tar in f.glob("*.tar")], "shard 'train-000.tar' is missing"),
        (lambda f: shutil.copy(f / "train-001.tar", f / "x.tar"), "shard 'x.tar' is not in the"),
        (_grow, "shard 'train-001.tar' has .* bytes, .* when its index was built"),
        (_swap, "shard 'train-001.tar' has changed since its index was built"),
        (lambda f: (f / INDEX).write_bytes(b"PK\3\4 half"), "index .* is damaged"),
        (lambda f: (f / INDEX).write_bytes(b""), "index .* is damaged"),
    ],
)
def test_what_does_not_fit_its_index_is_named(written, harm, said):
    folder, _ = written
    scan(folder)
    harm(folder)
    with pytest.raises(ValueError, match=said):
        scan(folder)


def test_a_shard_cut_short_gets_no_index(written):
    folder, _ = written
    whole = (folder / "train-001.tar").read_bytes()
    (folder / "train-001.tar").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"train-001.tar' is not a complete tar"):
        scan(folder)
    assert not (folder / INDEX).exists()


def test_what_is_no_source_of_images_is_told_what_to_do(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    for given in (tmp_path, tmp_path / "a.tar.gz"):
        with pytest.raises(ValueError, match=r"is compressed: .*; unpack it to .tar"):
            scan(given)
    (tmp_path / "x.jpg").touch()
    assert list(scan(tmp_path).names) == ["x.jpg"]  # the archive lies beside what was unpacked
    shard(tmp_path / "b.tar", {"notes.txt": b"none"})
    with pytest.raises(ValueError, match=r"no .* in the shards of"):
        scan(tmp_path)


@pytest.mark.parametrize(
    "members, labels, said",
    [
        # classes are folders, whatever stands before them
        ({"c1/0.jpg": b"", "c0/1.jpg": b""}, {"c1/0.jpg": "c1", "c0/1.jpg": "c0"}, []),
        ({"./c0/0.jpg": b"", "../²/1.jpg": b""}, {"./c0/0.jpg": "c0", "../²/1.jpg": "²"}, []),
        ({"./0.jpg": b"", "./0.cls": b"5"}, {"./0.jpg": "5"}, []),
        (
            {"0.jpg": b"", "0.cls": "²".encode(), "1.jpg": b"", "1.cls": b"12"},
            {"0.jpg": "²", "1.jpg": "12"},
            [],
        ),
        # one image of a key is read, others are counted
        (
            {"a.b.jpg": b"", "a.c.jpg": b"", "a.d.png": b""},
            {"a.b.jpg": None},
            ["2 images with the key .* of another image; rename them, for example 'a.c.jpg'"],
        ),
        # labels are found by key, or counted
        (
            {"0.jpg": b"", "1.jpg": b"", "0.cls": b"x", "1.CLS": b"y", "2.cls": b"z"},
            {"0.jpg": "x", "1.jpg": "y"},
            ["1 labels .* without an image of their key in the shard, for example '2.cls'"],
        ),
        (
            {"0.jpg": b"", "0.cls": b"x", "1.jpg": b"", "0.CLS": b"y"},
            {"0.jpg": "x", "1.jpg": None},
            ["1 labels .* another label of their key replaces", "1 of 2 images have no label"],
        ),
        (
            {"0.jpg": b"", "0.cls": b"\xff", "1.jpg": b"", "1.cls": b"9" * 2000},
            {"0.jpg": None, "1.jpg": None},
            ["2 labels .* not UTF-8 text of 1 to 1024 bytes, for example '0.cls'"],
        ),
        # other members are counted by ending
        (
            {"0.jpg": b"", "0.json": b"", "0.txt": b"", "0.cls.txt": b"3", "1.json": b""},
            {"0.jpg": None},
            ["4 members that are neither images nor .cls: 2 .json, 1 .txt, 1 .cls.txt"],
        ),
        (
            {"c/._0.jpg": b"", "c/0.jpg": b"", "__MACOSX/c/0.jpg": b""},
            {"c/0.jpg": "c"},
            ["2 hidden files .* for example 'c/._0.jpg'"],
        ),
        # a zero byte in a PAX name shifts no other sample
        (
            {"é\0.jpg": b"none", "0.jpg": b"", "0.cls": b"x"},
            {"0.jpg": "x"},
            [r"1 members with a zero byte in their name, for example 'é\\x00.jpg'"],
        ),
    ],
)
def test_nothing_is_left_out_without_a_line(members, labels, said, tmp_path, capsys):
    shard(tmp_path / "s.tar", members)
    for _ in range(2):  # also with an index
        source = scan(tmp_path)
        classes = [*source.classes, None]
        assert {n: classes[i] for n, i in zip(source.names, source.label_N, strict=True)} == labels
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(said), lines
        for line, expected in zip(lines, said, strict=True):
            assert re.search(expected, line)


@pytest.mark.parametrize(
    "listed, classes, said",
    [
        (
            "tench\ngoldfish\n",
            ("c0", "c1"),
            "ignored: it does not list folder 'c0' and 1",
        ),
        ("c1\r\nc0\r\nc2", ("c1", "c0", "c2"), None),
        ("\ufeffc1\nc0\nc0\n", ("c1", "c0", "c0"), "classes.txt names 'c0' twice"),
    ],
)
def test_a_list_of_classes_beside_class_folders(listed, classes, said, tmp_path, capsys):
    shard(tmp_path / "s.tar", {"c0/0.jpg": b"", "c1/0.jpg": b""})
    (tmp_path / "classes.txt").write_text(listed, newline="")
    source = scan(tmp_path)
    assert source.classes == classes
    assert [source.classes[i] for i in source.label_N] == ["c0", "c1"]
    out = capsys.readouterr().out
    assert said in out if said else not out
    (tmp_path / "classes.txt").write_text("other\n")
    scan(tmp_path)
    assert said or "classes.txt differs from the index and is ignored; to use it, delete" in (
        capsys.readouterr().out
    )


def test_what_lies_beside_shards_is_counted(tmp_path, capsys):
    for name in ("c0", "c1", ".hidden"):
        (tmp_path / name).mkdir()
    for name in ("x.jpg", "more.tar.gz", "sizes.json"):
        (tmp_path / name).touch()
    shard(tmp_path / "photos.tar", {"c0/0.jpg": b"0"})
    with (tmp_path / "photos.tar").open("ab") as tar:
        tar.write((tmp_path / "photos.tar").read_bytes())  # as cat joins two
    assert list(scan(tmp_path).names) == ["c0/0.jpg"]
    out = capsys.readouterr().out
    assert "read as tar shards (1, the first is 'photos.tar'); not read: 2 folders, " in out
    assert "2 folders, 1 images, 1 compressed archives (unpack them to .tar)" in out
    assert "1 shards with data after the end mark" in out


@pytest.mark.parametrize(
    "pattern, count",
    [
        ("{0}/train-{{000..002}}.tar", 20),
        ("{0}/train-{{001,002}}.tar", 12),
        ("{0}/train-{{001,002}}.tar=0.5,{0}/train-000.tar", 20),
        ("{0}/*.tar", 20),
        ("file:{0}/train-00[12].tar", 12),
        ("file://{0}", 20),
    ],
)
def test_patterns_stand_for_shards(pattern, count, written):
    folder, _ = written
    given = pattern.format(folder)
    data_spec.check(given, "--data.train")
    source = scan(given)
    assert len(source) == count and len(set(source.names)) == count
    kept = {file.name for file in folder.glob("*.npz")}
    assert len(scan(given)) == count and {file.name for file in folder.glob("*.npz")} == kept
    assert (count == 20 and "=" not in pattern) == (INDEX in kept)


@pytest.mark.parametrize(
    "given, said",
    [
        ("{0}/train-{{000..003}}.tar", r"1 of the 4 paths of .* do not exist, the first is .*003"),
        ("{0}/x*.tar", "stands for no file"),
        ("{0}/{{0..999999999}}.tar", "more than 100000 paths"),
        ("{0}/" + "{{a,b}}" * 17, "more than 16 braces"),
        ("{0}/" + "x" * 300 + ".tar", "does not exist"),
        ("pipe:curl -s http://host/{{0,1}}.tar", "not on this machine: pipe: is not read"),
        ("{0},s3://bucket/0.tar", "not on this machine: s3: is not read"),
    ],
)
def test_patterns_that_stand_for_nothing(given, said, written):
    with pytest.raises(ValueError, match=said):
        data_spec.check(given.format(written[0]), "--data.train")


@pytest.mark.parametrize("kind", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_headers_are_those_that_tarfile_reads(kind, tmp_path):
    folder = tmp_path / "photos" / "c" / ("long" * 12)
    folder.mkdir(parents=True)
    for i, name in enumerate(["a.jpg", "é.jpg", "x" * 30 + ".jpg", *["y" * 120 + ".jpg"] * 2]):
        (folder / name).write_bytes(b"." * 300 * i)
    os.link(folder / "a.jpg", folder / "z.jpg")
    os.mkfifo(folder / "pipe")
    command = ["tar", "cf", tmp_path / "t.tar", f"--format={kind}", "-C", tmp_path / "photos", "."]
    subprocess.run(command, stderr=subprocess.DEVNULL)  # v7 has no room for the longest name
    with tarfile.open(tmp_path / "t.tar") as archive:
        theirs = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    with (tmp_path / "t.tar").open("rb") as file:
        archive = Archive(file)
        ours = [(h.name, h.offset, h.size) for h in archive if h.kind in REGULAR]
    assert ours == theirs and len(ours) >= 3 and not archive.ending


def test_a_shard_that_goes_away_stops_the_run(written):
    folder, _ = written
    source = scan(folder)
    is_open = source.read(1).tobytes()
    (folder / "train-002.tar").unlink()
    with pytest.raises(MissingShard, match=r"train-002\.tar' was deleted during the run"):
        source.read(19)
    assert source.read(1).tobytes() == is_open


def test_few_files_stay_open(tmp_path):
    files = OpenFiles(limit=3)
    paths = [tmp_path / str(i) for i in range(10)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 10)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [files.read(path, 5, 2) for path in paths] == [bytes([i]) * 2 for i in range(10)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    assert files.read(paths[0], 8, 5) == b"\0\0"  # ends there
