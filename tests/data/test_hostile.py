"""Shards, indexes and images from strangers: a sentence, or a broken image, in bounded time."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter

import hostile_inputs
import numpy as np
import pytest
from tar_shards import shard

from unic_ds.data import scan
from unic_ds.data.shards import INDEX

SEED, COUNT = 15, 250


@pytest.fixture
def indexed(tmp_path):
    """Two shards of ten samples each, and their index."""
    for number in range(2):
        names = [f"{number}{i}" for i in range(10)]
        members = {f"{name}.jpg": name.encode() for name in names}
        shard(tmp_path / f"{number}.tar", members | {f"{names[0]}.cls": b"b", "x.cls": b"a"})
    scan(tmp_path)
    return tmp_path


def header(name, size=b"0", kind=b"0"):
    """A header whose checksum is right, with any bytes for a size."""
    block = bytearray(512)
    block[: len(name)], block[156:157] = name, kind
    block[124 : 124 + len(size)] = size
    block[148:156] = b"%07o\0" % (sum(block) + 8 * ord(" "))
    return bytes(block)


def pax(text):
    return header(b"pax", b"%o" % len(text), b"x") + text.ljust(-(-len(text) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    "harm, said",
    [
        (
            header(b"b.jpg", b"\x80" + (1 << 40).to_bytes(11)),
            r"member 'b\.jpg' announces 10995.* are",
        ),
        (header(b"b.jpg", b"\x80" + b"\xff" * 11), "member 'b.jpg' announces 30948500"),
        (header(b"b.jpg", b"\xff" * 10 + b"\xfc\x00"), "member 'b.jpg' announces -1024 bytes"),
        (header(b"b.jpg", b"77777777777"), "member 'b.jpg' announces 8589934591 bytes"),
        (header(b"b.jpg", b"12x"), "byte 1024 has a size that is not a number"),
        (header(b"b.jpg", b"20") + b"cut", "it ends inside member 'b.jpg'|announces 16 bytes"),
        (header(b"b.jpg")[:300], "it ends inside the header at byte 1024"),
        (header(b"b.jpg")[:-1] + b"x", "there is no header at byte 1024"),
        (header(b"long", b"\x80" + (6 << 30).to_bytes(11), b"L"), "'long' announces 6442450944"),
        (header(b"long", b"4000001", b"L") + bytes(1 << 21), "at byte 1024 has 1048577 bytes"),
        (header(b"long", b"\xff" * 12, b"L"), "announces -1 bytes"),
        (
            pax(b"28 size=9223372036854775809\n") + header(b"b.jpg"),
            "announces 9223372036854775809 b",
        ),
        (pax(b"11 size=-5\n") + header(b"b.jpg"), "member 'b.jpg' announces '-5' bytes"),
        (
            pax(b"99 path=b.jpg\n") + header(b"b.jpg"),
            "the extension header at byte 1024 is damaged",
        ),
        (pax(b"22 GNU.sparse.major=1\n") + header(b"b.jpg"), "'b.jpg' is sparse"),
        (header(b"b.jpg", kind=b"S"), "'b.jpg' is sparse; write it without --sparse"),
        (
            header(b"long", kind=b"L") * 3000,
            "no member follows the extension header before byte 153",
        ),
    ],
)
def test_headers_that_lie_cost_a_sentence(harm, said, tmp_path):
    tar = tmp_path / "s.tar"
    tar.write_bytes(header(b"a.jpg", b"3") + b"abc".ljust(512, b"\0") + harm)
    with pytest.raises(ValueError, match=rf"s\.tar' is not a complete tar \({'.*'}{said}"):
        scan(tar)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "it is empty"),
        (b"\x1f\x8b" + bytes(600), "it is compressed by gzip; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull to fetch the file"),
        (b"<html>", "it does not begin with a tar header"),
    ],
)
def test_what_is_no_tar_is_told(data, said, tmp_path):
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        scan(tmp_path)


def test_pipes_are_no_files(tmp_path):
    names = ("s.tar", "classes.txt", INDEX)
    for name in names:
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "r.tar", {"0.jpg": b"0"})
        os.mkfifo(tmp_path / name / name)
    code = """
import sys
from unic_ds.data import scan
for folder in sys.argv[1:]:
    try:
        scan(folder)
    except ValueError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, *(tmp_path / name for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    for line, name in zip(done.stdout.splitlines(), names, strict=True):
        assert f"{name}/{name}'" in line and "is not a regular file" in line


def lied(folder, **arrays):
    """Rewrite an index: None removes an array."""
    with np.load(folder / INDEX) as stored:
        tables = dict(stored) | arrays
    (folder / INDEX).write_bytes(b"")
    with (folder / INDEX).open("wb") as file:
        np.savez(file, **{name: array for name, array in tables.items() if array is not None})


def _bomb(folder):
    with zipfile.ZipFile(folder / INDEX, "w", zipfile.ZIP_DEFLATED) as stored:
        stored.writestr("names.npy", bytes(1 << 24))


def _announces(folder):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<i8", "fortran_order": False, "shape": (1 << 43,)}
    )
    with zipfile.ZipFile(folder / INDEX, "w") as stored:
        stored.writestr("offset_N.npy", file.getvalue())


def _plain(folder):
    with (folder / INDEX).open("wb") as file:
        np.save(file, NUMBERS)


NUMBERS = np.arange(20)


@pytest.mark.parametrize(
    "harm, said",
    [
        (_bomb, r"is damaged \(it is compressed\); delete it to have it built again"),
        (_announces, r"is damaged \(an array announces 70368744177664 bytes of 0\)"),
        (_plain, "is damaged"),
        (lambda f: lied(f, classes=np.array(["a", None])), "is damaged"),
        (lambda f: lied(f, extra=NUMBERS), "array 'extra' is unknown"),
        (lambda f: lied(f, format=np.array(2)), "has format 2, not 1; delete it"),
        (lambda f: lied(f, label_N=None), "label_N is missing"),
        (lambda f: lied(f, offset_N=NUMBERS[:9] + 512), r"offset_N is int64 of shape \[9\]"),
        (lambda f: lied(f, size_N=NUMBERS[:, None]), r"size_N is int64 of shape \[20, 1\]"),
        (lambda f: lied(f, offset_N=np.array(["x"] * 20)), "offset_N is <U1"),
        (lambda f: lied(f, label_N=NUMBERS.astype(np.float32)), "label_N is float32"),
        (lambda f: lied(f, names=np.frombuffer(b"cut", np.uint8)), "names is cut off"),
        (lambda f: lied(f, names=np.zeros((2, 10), np.uint8)), "names is uint8 of shape"),
        (lambda f: lied(f, shards=np.zeros(2, np.uint8)), "name of a shard is repeated"),
        (lambda f: lied(f, shards=np.frombuffer(b"../0\0" * 2, np.uint8)), "name of a shard is"),
        (lambda f: lied(f, shards=np.zeros(1 << 20, np.uint8)), "it has 1048576 shards with 2 si"),
        (lambda f: lied(f, classes=np.zeros(2 << 20, np.uint8)), "and 2097152 classes"),
        (lambda f: lied(f, notes=np.zeros(5 << 20, np.uint8)), "bytes are more than its shards ne"),
        (lambda f: lied(f, shard_N=np.full(20, 5, np.int32)), "shard_N is not ascending from 0"),
        (lambda f: lied(f, shard_N=np.full(20, -1, np.int32)), "shard_N is not ascending from 0"),
        (
            lambda f: lied(f, shard_N=NUMBERS.astype(np.int32)[::-1] // 7),
            "shard_N is not ascending",
        ),
        (lambda f: lied(f, label_N=np.full(20, 99, np.int32)), "label_N is outside of -1 to 0"),
        (lambda f: lied(f, size_N=np.full(20, 1 << 62)), "image 0 lies outside of its shard"),
        (lambda f: lied(f, size_N=np.full(20, -1)), "image 0 lies outside of its shard"),
        (lambda f: lied(f, offset_N=NUMBERS), "image 0 lies outside of its shard"),
        (
            lambda f: lied(f, offset_N=NUMBERS[::-1] * 512 + 512),
            "image 1 overlaps the image befo",
        ),
    ],
)
def test_an_index_that_lies_costs_a_sentence(harm, said, indexed):
    harm(indexed)
    with pytest.raises(ValueError, match=rf"{INDEX}'.*{said}"):
        scan(indexed)
    (indexed / INDEX).unlink()
    assert len(scan(indexed)) == 20


@pytest.mark.slow
def test_damaged_files_end_in_a_sentence(tmp_path):
    """Hundreds of damaged shards, indexes and images, in one process with little memory."""
    script = [sys.executable, hostile_inputs.__file__, tmp_path, str(SEED), str(COUNT)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    rows = [json.loads(line) for line in lines]
    wrong = [row for row in rows if row["ended"] not in ("ok", "refused")]
    assert not wrong, f"{len(wrong)} cases, the first: {wrong[0]}"
    slow = [row for row in rows if row["seconds"] > hostile_inputs.SECONDS]
    assert not slow, slow
    count = Counter((row["kind"], row["ended"]) for row in rows)
    assert count.total() == 3 * COUNT
    assert (
        min(count["tar", "refused"], count["index", "refused"], count["image", "ok"]) > COUNT // 4
    )
