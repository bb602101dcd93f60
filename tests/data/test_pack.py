"""Packs: the same pixels as the folder, the same bytes after kill -9, opened by other libraries."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import webdataset
from pictures import encode, folder, orientation, photo
from PIL import Image

from unic_ds import cli
from unic_ds.data import pack, scan, shard_index, shards
from unic_ds.data.source import Source
from unic_ds.data.string_table import StringTable
from unic_ds.data.verify import verify
from unic_ds.process import entry_point

SETTINGS = pack.Settings(shard_mb=0.05)
COUNT = 60


def kinds():
    """Name -> bytes of every kind of image, and of broken files."""
    clear = photo(60, 40).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((60, 40)))
    whole = encode(photo()).tobytes()
    return {
        "a/baseline.jpg": whole,
        "a/progressive.JPEG": encode(photo(), progressive=True).tobytes(),
        "a/cmyk.v1.jpg": encode(photo().convert("CMYK")).tobytes(),
        "a/grey.jpg": encode(photo().convert("L")).tobytes(),
        "b.d/turned.jpg": encode(photo(80, 50), exif=orientation(6)).tobytes(),
        "b.d/clear.png": encode(clear, "PNG").tobytes(),
        "b.d/clear.jpg": encode(photo(30, 30)).tobytes(),
        "b.d/lossy.webp": encode(photo(), "WEBP").tobytes(),
        "b.d/rgb.bmp": encode(photo(20, 10), "BMP").tobytes(),
        "b.d/png named.jpg": encode(photo(20, 10), "PNG").tobytes(),
        "loose.jpg": encode(photo(33, 22)).tobytes(),
        "a/gif.jpg": encode(photo(60, 60), "GIF").tobytes(),
        "a/empty.jpg": b"",
        "b.d/cut.jpg": whole[: len(whole) // 2],
        "b.d/noise.png": encode(photo(), "PNG").tobytes()[:3000],
    }


BROKEN = {"a/gif.jpg", "a/empty.jpg", "b.d/cut.jpg", "b.d/noise.png"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    for name, data in kinds().items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("pictures"), COUNT)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A pack of `pictures` in several shards."""
    out = tmp_path_factory.mktemp("whole") / "pack"
    pack.pack(scan(pictures), out, SETTINGS, workers=2)
    return out


def image(data):
    return Image.open(io.BytesIO(data))


def tables_of(out):
    return shard_index.load(out / shards.INDEX, sorted(out.glob("*.tar")))


def digests(out):
    return {
        tar.name: hashlib.sha256(tar.read_bytes()).hexdigest() for tar in sorted(out.glob("*.tar"))
    }


def test_every_kind_is_packed_as_it_is_or_listed(zoo, tmp_path):
    said = pack.pack(scan(zoo), tmp_path / "pack", pack.Settings(), workers=1)
    source = scan(tmp_path / "pack")
    got = {name: source.read(i).tobytes() for i, name in enumerate(source.names)}
    for name in ("a/baseline", "a/grey", "b.d/turned", "loose"):
        assert got[f"{name}.jpg"] == kinds()[f"{name}.jpg"]
    assert got["a/progressive.jpg"] == kinds()["a/progressive.JPEG"]
    assert got["a/cmyk_v1.jpg"] == kinds()["a/cmyk.v1.jpg"]
    assert got["b.d/lossy.webp"] == kinds()["b.d/lossy.webp"]
    assert got["b.d/rgb.bmp"] == kinds()["b.d/rgb.bmp"]
    assert got["b.d/png named.png"] == kinds()["b.d/png named.jpg"]
    assert {"b.d/clear.jpg", "b.d/clear~2.png"} == {name for name in got if "clear" in name}
    white = np.asarray(image(got["b.d/clear~2.png"]))
    share_HW1 = np.asarray(image(kinds()["b.d/clear.png"]))[..., 3:] / 255
    want = share_HW1 * np.asarray(photo(60, 40)) + (1 - share_HW1) * 255
    assert white.shape == (40, 60, 3) and np.abs(white - want).max() < 1
    assert len(got) == len(kinds()) - len(BROKEN)
    listed = (tmp_path / "pack" / pack.BROKEN).read_text().splitlines()
    assert {line.split("\t")[0] for line in listed} == BROKEN
    assert "4 images are broken, see" in said and "11 images in 1 shards" in said
    assert source.classes == ("a", "b.d")
    label = dict(zip(source.names, source.label_N.tolist(), strict=True))
    assert {name: label[name] for name in ("a/grey.jpg", "b.d/rgb.bmp", "loose.jpg")} == {
        "a/grey.jpg": 0,
        "b.d/rgb.bmp": 1,
        "loose.jpg": -1,
    }
    tables = tables_of(tmp_path / "pack")
    turned = list(source.names).index("b.d/turned.jpg")
    assert (tables["width_N"][turned], tables["height_N"][turned]) == (50, 80)
    assert "is intact: 11 images" in verify(tmp_path / "pack")


def test_a_largest_side_shrinks_and_turns_upright(zoo, tmp_path):
    pack.pack(scan(zoo), tmp_path / "pack", pack.Settings(max_side=40), workers=1)
    source = scan(tmp_path / "pack")
    got = {name: image(source.read(i).tobytes()) for i, name in enumerate(source.names)}
    assert max(max(each.size) for each in got.values()) == 40
    assert got["b.d/turned.jpg"].size == (25, 40) and not got["b.d/turned.jpg"].getexif()
    assert source.read(list(got).index("loose.jpg")).tobytes() == kinds()["loose.jpg"]
    small = photo(80, 50).resize((40, 25), Image.Resampling.BICUBIC).rotate(-90, expand=True)
    gap = np.asarray(small, dtype=float) - np.asarray(got["b.d/turned.jpg"], dtype=float)
    assert np.abs(gap).mean() < 6
    assert verify(tmp_path / "pack")


def test_a_pack_shows_the_pixels_of_the_folder_mixed(pictures, whole):
    plain, packed = scan(pictures), scan(whole)
    assert sorted(packed.names) == list(plain.names) and list(packed.names) != list(plain.names)
    place = {name: i for i, name in enumerate(plain.names)}
    for i, name in enumerate(packed.names):
        assert np.array_equal(packed.read(i), plain.read(place[name]))
        assert packed.label_N[i] == plain.label_N[place[name]]
    assert packed.classes == plain.classes
    counts = np.bincount(packed.shard_N)
    assert len(counts) > 2 and counts.sum() == COUNT
    assert not (whole / pack.PARTIAL).exists()


def test_a_pack_is_packed_again(whole, tmp_path):
    pack.pack(scan(whole), tmp_path / "again", pack.Settings(seed=1), workers=1)
    again, once = scan(tmp_path / "again"), scan(whole)
    assert sorted(again.names) == sorted(once.names) and again.classes == once.classes
    label = dict(zip(once.names, once.label_N, strict=True))
    assert [label[name] for name in again.names] == again.label_N.tolist()


def command(pictures, out, *more):
    words = ["pack", str(pictures), str(out), "--shard_mb", str(SETTINGS.shard_mb), *more]
    return [sys.executable, "-m", "unic_ds.cli", *words]


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(pictures, whole, tmp_path):
    out = tmp_path / "pack"
    kills = 0
    for _ in range(2):
        before = len(digests(out))
        started = subprocess.Popen(
            command(pictures, out, "--workers", "1"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while started.poll() is None and len(digests(out)) == before:
            time.sleep(0.001)
        if started.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        kills += 1
    assert kills == 2
    subprocess.run(command(pictures, out, "--workers", "2"), check=True)
    assert digests(out) == digests(whole)
    ours, theirs = tables_of(out), tables_of(whole)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"mtime_S"}:
        assert np.array_equal(ours[name], theirs[name]), name
    done = subprocess.run(command(pictures, out), check=True, capture_output=True, text=True)
    assert f"{COUNT} images" in done.stdout
    assert verify(out)


def test_another_pack_is_not_written_over(pictures, whole, zoo, tmp_path):
    before = digests(whole)
    with pytest.raises(ValueError, match=r"is a pack with shard_mb 0.05, not 512"):
        pack.pack(scan(pictures), whole, pack.Settings())
    with pytest.raises(ValueError, match="is a pack with images 60, not 15"):
        pack.pack(scan(zoo), whole, SETTINGS)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a pack"):
        pack.pack(scan(pictures), tmp_path, SETTINGS)
    assert digests(whole) == before and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_to_pack_is_said(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.jpg").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"none of 1 images can be packed: 'x\.jpg' is not a JPEG"):
        pack.pack(scan(tmp_path / "src"), tmp_path / "out", SETTINGS, workers=1)


def test_a_shard_that_cannot_be_written_is_said(pictures, tmp_path):
    out = tmp_path / "pack"
    pack.pack(scan(pictures), out, SETTINGS, workers=1)
    (out / shards.INDEX).unlink()
    (out / "000001.tar").unlink()
    (out / pack.PARTIAL / "000001.tar").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"cannot be written .*run the same command again"):
        pack.pack(scan(pictures), out, SETTINGS, workers=1)


def test_odd_names_stay_apart(tmp_path):
    (tmp_path / "src" / ".a\nb").mkdir(parents=True)
    good, bad = encode(photo(30, 20)).tobytes(), b"none"
    for name, data in ((".a\nb/one.jpg", good), ("tab\tline\nbreak.jpg", bad)):
        (tmp_path / "src" / name).write_bytes(data)
    names = StringTable.of([".a\nb/one.jpg", "tab\tline\nbreak.jpg"])
    source = Source(tmp_path / "src", names, (".a\nb",), np.array([0, -1], np.int32))
    pack.pack(source, tmp_path / "pack", pack.Settings(), workers=1)
    packed = scan(tmp_path / "pack")
    assert list(packed.names) == ["_.a\nb/one.jpg"] and packed.classes == (".a\nb",)
    lines = (tmp_path / "pack" / pack.BROKEN).read_text().split("\n")
    assert lines == [
        r"tab\tline\nbreak.jpg" + "\tis not a JPEG, PNG, WebP or BMP file",
        "",
    ]
    assert (tmp_path / "pack" / "classes.txt").read_text() == ".a\\nb\n"
    assert verify(tmp_path / "pack")


def _record(out, **changes):
    """Change a record of an unfinished pack; a value may be bytes for the whole file."""
    file = out / pack.PARTIAL / "000000.tar.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def unfinished(pictures, tmp_path_factory):
    """A pack that stopped before its last shard."""
    out = tmp_path_factory.mktemp("unfinished") / "pack"
    (out / pack.PARTIAL / "000001.tar").mkdir(parents=True)
    (out / pack.PARTIAL / "000001.tar" / "full").touch()
    source = scan(pictures)
    manifest = {"format": pack.FORMAT, "images": COUNT, "source": source.fingerprint()}
    (out / pack.MANIFEST).write_text(json.dumps(manifest | asdict(SETTINGS)))
    with pytest.raises(RuntimeError, match="run the same command again"):
        pack.pack(source, out, SETTINGS, workers=1)
    return out


@pytest.mark.parametrize(
    "harm, said",
    [
        (
            lambda f: (f / pack.MANIFEST).write_text("{"),
            r"pack.json' is damaged .* name a new fold",
        ),
        (
            lambda f: (f / pack.MANIFEST).write_text("[1]"),
            "pack.json' is damaged .it is not a J",
        ),
        (lambda f: _record(f, end=10**30), "json' does not fit its pack; delete it"),
        (lambda f: _record(f, members=[]), "json' does not fit its pack; delete it"),
        (lambda f: _record(f, members="all"), "json' is not the record of a shard; delete it"),
        (lambda f: _record(f, sha256="x"), "json' is not the record of a shard; delete it"),
        (lambda f: _record(f, more=1), "json' is not the record of a shard; delete it"),
        (lambda f: (f / pack.PARTIAL / "000000.tar.json").write_text("[" * 9999), "is damaged"),
    ],
)
def test_records_that_lie_cost_a_sentence(harm, said, unfinished, pictures, tmp_path):
    shutil.copytree(unfinished, tmp_path / "pack")
    harm(tmp_path / "pack")
    with pytest.raises(ValueError, match=said):
        pack.pack(scan(pictures), tmp_path / "pack", SETTINGS, workers=1)


@pytest.fixture
def copy(whole, tmp_path):
    """A pack to harm."""
    (tmp_path / "pack").mkdir()
    for file in whole.iterdir():
        (tmp_path / "pack" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "pack"


def rewritten(out, **changes):
    tables = tables_of(out)
    for name, change in changes.items():
        tables[name] = change(tables[name].copy())
    shard_index.write(tables, out / shards.INDEX)


def _flip(out):
    data = bytearray((out / "000001.tar").read_bytes())
    data[-20_000] ^= 1
    stat = (out / "000001.tar").stat()
    (out / "000001.tar").write_bytes(data)
    os.utime(out / "000001.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "harm, said",
    [
        (_flip, r"1 faults.*\n  000001.tar: its bytes have changed"),
        (lambda out: (out / "000002.tar").unlink(), "000002.tar: is missing"),
        (lambda out: (out / "x.tar").touch(), "x.tar: is not in the index"),
        (lambda out: rewritten(out, offset_N=lambda x: x + 512), r"60 faults(.*\n)*  and 50 more"),
        (lambda out: rewritten(out, width_N=lambda x: x + 1), r"measures \(\d+, \d+\), \(\d+, \d+"),
        (lambda out: rewritten(out, label_N=lambda x: 1 - x), r"has class '\d', \d in the index"),
    ],
)
def test_verify_names_what_is_wrong(copy, harm, said):
    assert verify(copy)
    harm(copy)
    with pytest.raises(RuntimeError, match=said):
        verify(copy)


def test_verify_refuses_what_is_no_pack(copy, pictures, tmp_path):
    with pytest.raises(ValueError, match="is not a finished pack"):
        verify(pictures)
    (copy / shards.INDEX).unlink()
    assert scan(copy)
    with pytest.raises(ValueError, match="was not packed by unic-ds"):
        verify(copy)


def test_the_webdataset_library_opens_it(whole):
    source = scan(whole)
    tars = [str(tar) for tar in sorted(whole.glob("*.tar"))]
    rows = list(
        webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    )
    assert len(rows) == COUNT
    for i, (picture, label) in enumerate(rows):
        assert label == source.label_N[i]
        assert np.array_equal(np.asarray(picture), np.asarray(image(source.read(i).tobytes())))


def test_the_reader_of_dali_opens_it(whole):
    pytest.importorskip("nvidia.dali", reason="nvidia-dali-cuda130 is not installed")
    from nvidia.dali import fn, pipeline_def

    tars = [str(tar) for tar in sorted(whole.glob("*.tar"))]

    @pipeline_def(batch_size=COUNT, num_threads=1, device_id=None)
    def reading():
        return tuple(fn.readers.webdataset(paths=tars, ext=["jpg;png;webp", "cls"]))

    pipe = reading()
    encoded, label = pipe.run()
    source = scan(whole)
    for i in range(COUNT):
        assert encoded.at(i).tobytes() == source.read(i).tobytes()
        assert int(label.at(i).tobytes()) == source.label_N[i]


@pytest.mark.parametrize(
    "words, said",
    [
        (["pack", "{pictures}"], "pack needs SRC and OUT"),
        (["pack", "{pictures}", "{out}", "--shard_mb", "0"], "--shard_mb must be positive"),
        (["pack", "{pictures}", "{out}", "--sharp_mb", "9"], "unknown option --sharp_mb"),
        (["pack", "{pictures}", "{out}", "--workers", "two"], "--workers"),
        (["pack", "{out}", "{out}"], "do not exist"),
        (["pack", "verify", "{pictures}"], "is not a finished pack"),
    ],
)
def test_mistakes_cost_a_sentence(words, said, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert entry_point.run(cli.dispatch, [w.format(pictures=pictures, out=out) for w in words]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_damaged_pack_is_a_failure(copy, capsys):
    assert entry_point.run(cli.dispatch, ["pack", "verify", str(copy)]) == 0
    _flip(Path(copy))
    assert entry_point.run(cli.dispatch, ["pack", "verify", str(copy)]) == 1
    assert "000001.tar: its bytes have changed" in capsys.readouterr().err
