"""Tar shards, also those that others wrote, read in place by an index that is built once."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from unic_ds.data import order, scan
from unic_ds.data.shards import INDEX, MissingShard, OpenFiles


def shard(path, members):
    """A tar of {name: content}."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


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
    assert source.runs(2) == (order.Run(20, (8, 8, 4), 2),)
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


def test_an_index_lies_in_the_cache_where_the_folder_is_read_only(written, tmp_path, monkeypatch):
    folder, _ = written
    monkeypatch.setenv("UNIC_DS_CACHE", str(tmp_path / "cache"))
    (folder / INDEX).mkdir()  # root may write anywhere, but not over a folder
    monkeypatch.setattr("unic_ds.data.shards.INDEX", f"{INDEX}/none/index.npz")
    assert len(scan(folder)) == 20
    (index,) = (tmp_path / "cache" / "indexes").iterdir()
    stamp = index.stat().st_mtime_ns
    assert len(scan(folder)) == 20 and index.stat().st_mtime_ns == stamp


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
    with pytest.raises(ValueError, match=r"train-001.tar' is not a whole tar"):
        scan(folder)
    assert not (folder / INDEX).exists()


def test_compressed_and_empty_shards_are_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="is compressed"):
        scan(tmp_path)
    shard(tmp_path / "b.tar", {"notes.txt": b"none"})
    with pytest.raises(ValueError, match=r"no .* in the shards of"):
        scan(tmp_path)


def test_a_shard_that_goes_away_stops_the_run(written):
    folder, _ = written
    source = scan(folder)
    is_open = source.read(1).tobytes()
    (folder / "train-002.tar").unlink()
    with pytest.raises(MissingShard, match=r"train-002\.tar' is gone since the start"):
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
