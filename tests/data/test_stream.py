"""The stream of batches is the same on any number of ranks, after any seek, with broken files."""

from __future__ import annotations

import logging
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from pictures import encode, folder, orientation, photo

from unic_ds.config import Data
from unic_ds.data import Stream, passes, scan
from unic_ds.data.reader import Reader, measure
from unic_ds.data.source import MAX_MB, Source
from unic_ds.models.resolution import StepShape

CPU = torch.device("cpu")
COUNT = 24
BACKENDS = ["dali", "torch"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("pictures"), COUNT)


def need(backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia-dali-cuda130 is not installed")


def stream(
    root,
    cfg=None,
    *,
    batch_size=8,
    micro=4,
    rank=0,
    world=1,
    sizes=(32, 48),
    seed=0,
    device=CPU,
    shape_of=None,
):
    cfg = cfg or Data(backend="torch")
    return Stream(
        root if isinstance(root, Source) else scan(root),
        cfg,
        seed=seed,
        sizes=sizes,
        batch_size=batch_size,
        micro=micro,
        rank=rank,
        world=world,
        device=device,
        shape_of=shape_of,
    )


def take(batches, count):
    """The next `count` batches; closes the stream."""
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(ours, theirs):
    """True if two batches have the same samples and pixels."""
    return (
        np.array_equal(ours.index_B, theirs.index_B)
        and np.array_equal(ours.position_B, theirs.position_B)
        and all(torch.equal(ours.images[size], theirs.images[size]) for size in ours.images)
    )


def by_position(batches, batch_size, accumulation):
    """(step, position) -> (sample, pixels) over all batches of one rank."""
    rows = {}
    for k, batch in enumerate(batches):
        for b, position in enumerate(batch.position_B.tolist()):
            pixels = {size: image_B3HW[b] for size, image_B3HW in batch.images.items()}
            rows[k // accumulation, position] = (int(batch.index_B[b]), pixels)
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_ranks_sees_the_same_run(backend, pictures):
    need(backend)
    cfg = Data(backend=backend)
    alone = by_position(take(stream(pictures, cfg, micro=8), 4), 8, 1)
    for world, micro in ((2, 2), (4, 2)):
        together = {}
        for rank in range(world):
            accumulation = 8 // (micro * world)
            ours = stream(pictures, cfg, micro=micro, rank=rank, world=world)
            together |= by_position(take(ours, 4 * accumulation), 8, accumulation)
        assert together.keys() == alone.keys()
        for place, (index, pixels) in alone.items():
            assert together[place][0] == index
            assert all(torch.equal(together[place][1][size], pixels[size]) for size in pixels)
    assert sorted(alone[g // 8, g % 8][0] for g in range(COUNT)) == list(range(COUNT))


@pytest.mark.parametrize("backend", BACKENDS)
def test_seek_goes_on_where_a_run_left(backend, pictures):
    need(backend)
    cfg = Data(backend=backend, prefetch=3)
    straight = take(stream(pictures, cfg), 12)
    resumed = stream(pictures, cfg)
    next(resumed)
    resumed.seek(4)
    assert all(same(a, b) for a, b in zip(take(resumed, 4), straight[8:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_readers_shows_the_same(backend, pictures, tmp_path):
    """Broken files among them, and after a seek."""
    need(backend)
    root = shutil.copytree(pictures, tmp_path / "copy")
    for index, how in ((3, "empty"), (4, "decoder"), (20, "decoder")):
        harm(root / scan(root).names[index], how)
    shown = {}
    for readers in (1, 3, 16):
        ours = stream(root, Data(backend=backend, readers=readers, bad_limit=0.2))
        shown[readers] = [next(ours) for _ in range(4)]
        ours.seek(4)
        shown[readers] += take(ours, 6)
    for readers in (3, 16):
        assert all(same(a, b) for a, b in zip(shown[readers], shown[1], strict=True))


@dataclass(frozen=True, eq=False)
class Distant(Source):
    """A source on a file server with a latency of 0.1 s; it counts concurrent reads."""

    in_flight: list[int] = field(default_factory=lambda: [0, 0])  # files being read: now, at most

    def read(self, index, max_mb=MAX_MB):
        with LOCK:
            self.in_flight[0] += 1
            self.in_flight[1] = max(self.in_flight)
        time.sleep(0.1)
        with LOCK:
            self.in_flight[0] -= 1
        return super().read(index, max_mb)


LOCK = threading.Lock()


def test_sixteen_readers_hide_a_file_server_s_latency_better_than_four(pictures):
    """A micro batch has four files; those of the next are read at the same time."""
    waited, found = {}, scan(pictures)
    for readers in (4, 16):
        images = Distant(found.folder, found.names, found.classes, found.label_N)
        cfg = Data(backend="torch", augment="none", readers=readers)
        ours = stream(images, cfg, sizes=(32,))
        take(ours, 12)
        waited[readers] = ours.waited_s
        assert images.in_flight[1] == readers
    assert waited[4] > 1.1  # 48 files, 4 at once
    assert waited[16] < 0.6 * waited[4]  # 0.3 s, and decoding on a busy machine


@dataclass(frozen=True, eq=False)
class Raising(Source):
    """A source with one file whose read raises `error`."""

    error: type[BaseException] = Exception

    def read(self, index, max_mb=MAX_MB):
        if index == 7:
            raise self.error("no more")
        return super().read(index, max_mb)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt])
def test_whatever_ends_a_reader_reaches_who_iterates(pictures, error):
    found = scan(pictures)
    images = Raising(found.folder, found.names, found.classes, found.label_N, error)
    ours, raised = stream(images), []

    def iterate():
        try:
            take(ours, 12)
        except BaseException as error:
            raised.append(error)

    waiting = threading.Thread(target=iterate, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive() and [type(one) for one in raised] == [error]
    ours.close()


@pytest.mark.gpu
def test_a_stream_that_lags_gets_the_images_of_the_cpu(pictures):
    """The device lags two seconds; meanwhile the host decodes into memory that was freed."""
    ours = stream(pictures, device=torch.device("cuda"))
    # A new block of memory may wait for the device: have as many as will be needed.
    blocks = [torch.empty(12 * s * s, dtype=torch.uint8).pin_memory() for s in (32, 48) * 20]
    blocks += [block.cuda() for block in blocks]
    del blocks
    torch.cuda.synchronize()
    torch.cuda._sleep(int(4e9))
    late = take(ours, 12)
    assert not torch.cuda.current_stream().query()  # the host has not waited for a copy
    for batch, want in zip(late, take(stream(pictures), 12), strict=True):
        for size, image_B3HW in batch.images.items():
            assert torch.equal(image_B3HW.cpu(), want.images[size])


def test_batches_hold_what_was_asked_for(pictures):
    ours = stream(pictures, sizes=(32, 48, 32))
    batch = next(ours)
    assert list(batch.images) == [32, 48]
    assert batch.images[32].shape == (4, 3, 32, 32) and batch.images[32].dtype == torch.uint8
    assert batch.position_B.dtype == np.int64
    assert next(ours).position_B.tolist() == [4, 5, 6, 7]
    assert next(ours).position_B.tolist() == [0, 1, 2, 3]
    assert ours.waited_s > 0
    waited = ours.waited_s
    ours.close()
    assert ours.waited_s == waited
    other = take(stream(pictures, seed=1), 1)[0]
    assert not np.array_equal(batch.index_B, other.index_B)


def test_a_batch_size_that_does_not_divide_is_refused(pictures):
    with pytest.raises(ValueError, match="9 is not a multiple of micro batch 4 x 2 ranks"):
        stream(pictures, batch_size=9, world=2)


def harm(path, how):
    """Make the JPEG at `path` unreadable."""
    data = path.read_bytes()
    png = encode(photo(60, 60), "PNG").tobytes()
    if how == "vanished":
        path.unlink()
        return
    path.write_bytes(
        {
            "empty": b"",
            "gif": encode(photo(60, 60), "GIF").tobytes(),
            "cut off": data[: len(data) * 2 // 3],
            "no header": data[:40] + data[-2:],
            "noise": b"\xff\xd8\xff" + bytes(range(256)) * 9,
            "text": b"<html>404</html>",
            "decoder": png[: len(png) // 2],  # the header is sound: only a decoder notices
        }[how]
    )


HARMS = ["vanished", "empty", "gif", "cut off", "no header", "noise", "text", "decoder"]


def copied(pictures, root, index):
    """A copy of the folder, for sample `index` to be harmed in: (its path, its name)."""
    shutil.copytree(pictures, root)
    name = scan(root).names[index]
    return root / name, name


def expect_neighbour(batches, straight, bad, count):
    """Every slot is as without broken files, except that of `bad`, which has its neighbour."""
    met = 0
    for batch, want in zip(batches, straight, strict=True):
        hit_B = want.index_B == bad
        met += hit_B.sum()
        assert np.array_equal(batch.index_B, np.where(hit_B, (bad + 1) % count, want.index_B))
        assert np.array_equal(batch.position_B, want.position_B)
        for size, image_B3HW in batch.images.items():
            assert torch.equal(image_B3HW[~hit_B], want.images[size][~hit_B])
            changed = (image_B3HW != want.images[size]).flatten(1).any(1)
            assert changed.tolist() == hit_B.tolist()
    assert met == 2  # two epochs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", HARMS)
def test_a_bad_file_costs_its_slot_and_nothing_else(backend, how, pictures, tmp_path, caplog):
    need(backend)
    cfg = Data(backend=backend)
    straight = take(stream(pictures, cfg), 12)
    bad = int(straight[2].index_B[1])
    path, name = copied(pictures, tmp_path / "copy", bad)
    ours = stream(tmp_path / "copy", cfg)
    harm(path, how)
    with caplog.at_level(logging.WARNING, "unic_ds.data"):
        expect_neighbour(take(ours, 12), straight, bad, COUNT)
    assert [row[0] for row in ours.bad] == [name]
    assert len(caplog.records) == 1 and name in caplog.text and ours.bad[0][1] in caplog.text
    if how == "decoder":  # by the same words, whatever decodes
        assert ours.bad[0][1] == "cannot be decoded (image file is truncated)"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_file_at_every_place_of_a_batch(backend, pictures, tmp_path):
    need(backend)
    cfg = Data(backend=backend)
    straight = take(stream(pictures, cfg), 12)
    root = tmp_path / "copy"
    shutil.copytree(pictures, root)
    for place in range(12):  # before, in and behind what is in flight at the start
        bad = int(straight[place // 4].index_B[place % 4])
        path = root / scan(root).names[bad]
        sound = path.read_bytes()
        ours = stream(root, cfg)
        harm(path, "decoder")
        expect_neighbour(take(ours, 12), straight, bad, COUNT)
        path.write_bytes(sound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_that_are_bad_too_are_passed_over(backend, pictures, tmp_path):
    need(backend)
    cfg = Data(backend=backend, bad_limit=0.2)
    root = tmp_path / "copy"
    shutil.copytree(pictures, root)
    names = scan(root).names
    for index, how in ((22, "decoder"), (23, "empty"), (0, "decoder")):
        harm(root / names[index], how)
    batches = take(stream(root, cfg), 12)
    shown = np.concatenate([batch.index_B for batch in batches])
    want = np.concatenate([batch.index_B for batch in take(stream(pictures, cfg), 12)])
    assert np.array_equal(shown, np.where(np.isin(want, [22, 23, 0]), 1, want))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["empty", "decoder"])
def test_too_many_bad_files_stop_the_run_with_the_list(backend, how, pictures, tmp_path):
    need(backend)
    root = tmp_path / "copy"
    shutil.copytree(pictures, root)
    names = scan(root).names
    for index in (3, 9, 15):
        harm(root / names[index], how)
    ours = stream(root, Data(backend=backend, bad_limit=0.1))  # 2 of 24
    with pytest.raises(ValueError, match="3 of 24 images cannot be read") as stop:
        for _ in range(12):
            next(ours)
    ours.close()
    assert all(names[index] in str(stop.value) for index in (3, 9, 15))
    assert "bad_limit" in str(stop.value)


def test_nothing_readable_is_said(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    ours = stream(tmp_path, Data(bad_limit=1.0))
    with pytest.raises(ValueError, match="none of 3 images can be read"):
        next(ours)
    ours.close()


def test_what_a_header_says(tmp_path):
    assert measure(encode(photo(60, 40)), 50) == (60, 40)
    assert measure(encode(photo(60, 40), exif=orientation(6)), 50) == (40, 60)
    assert measure(encode(photo(60, 40), "WEBP", exif=orientation(5)), 50) == (40, 60)
    assert measure(encode(photo(60, 40), exif=orientation(3)), 50) == (60, 40)
    padded = np.concatenate([encode(photo(60, 40)), np.zeros(500, dtype=np.uint8)])
    assert measure(padded, 50) == (60, 40)
    with pytest.raises(ValueError, match=r"60 x 40 pixels, more than data\.max_megapixels 0\.002"):
        measure(encode(photo(60, 40)), 0.002)
    with pytest.raises(ValueError, match="is not a JPEG, PNG, WebP or BMP file"):
        measure(encode(photo(60, 40), "GIF"), 50)
    with pytest.raises(ValueError, match="is cut off"):
        measure(encode(photo(60, 40))[:-2], 50)


def test_a_decompression_bomb_is_not_decoded(pictures, tmp_path):
    """A PNG of 10 kB whose header announces 400 megapixels."""
    root = tmp_path / "copy"
    shutil.copytree(pictures, root)
    bomb = bytearray(encode(photo(60, 60), "PNG").tobytes())
    bomb[16:24] = (20_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    name = scan(root).names[5]
    (root / name).write_bytes(bytes(bomb))
    ours = stream(root)
    take(ours, 6)
    assert ours.bad == [(name, "has 20000 x 20000 pixels, more than data.max_megapixels 50")]


def segment(marker, payload):
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def chunk(kind, payload=b""):
    """A chunk of a PNG."""
    body = kind + payload
    return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))


def with_inside(kind, extra):
    """A picture with those bytes near the begin of its file."""
    data = encode(photo(60, 40), kind).tobytes()
    at = 2 if kind == "JPEG" else 33
    return data[:at] + extra + data[at:]


def with_scans(count, *, before=b"", behind=b""):
    """A progressive JPEG with `count` scans of nothing more than encoders make."""
    data = encode(photo(60, 40), progressive=True).tobytes()
    empty = segment(0xDA, b"\1\1\0\1\x3f\0") + b"\0"
    return data[:-2] + empty * count + before + data[-2:] + behind


def webp_with(extra, *, counted=True):
    """A WebP with more bytes, inside the size in its header (`counted`) or after it."""
    data = encode(photo(60, 40), "WEBP").tobytes()
    size = len(data) - 8 + counted * len(extra)
    return data[:4] + struct.pack("<I", size) + data[8:] + extra


FILM = b"\xff\xda" * 500  # as by chance among random bytes
HEAVY = {
    "segments": (lambda: with_inside("JPEG", segment(0xE4, b"x" * 60_000) * 300), "16000000 bytes"),
    "exif": (
        lambda: with_inside("JPEG", segment(0xE1, b"Exif\0\0MM\0*" + b"x" * 60_000) * 300),
        "16000000 bytes before its first scan",
    ),
    "small segments": (lambda: with_inside("JPEG", segment(0xE1, b"x") * 2000), "1024 segments"),
    "fill": (lambda: with_inside("JPEG", b"\xff" * 70_000), "outside of segments"),
    "scans": (lambda: with_scans(200), "more than 100 scans"),
    "scans behind a false end": (
        lambda: with_scans(200, before=segment(0xFE, b"\xff\xd9") + FILM),
        "more than 100 scans",
    ),
    "tables": (lambda: with_scans(0, before=segment(0xFE, b"") * 900 + FILM), "100 scans"),
    "small chunks": (lambda: with_inside("PNG", chunk(b"abCd") * 70_000), "65536 chunks"),
    "empty pixels": (lambda: with_inside("PNG", chunk(b"IDAT") * 70_000), "65536 chunks"),
    "large chunk": (
        lambda: with_inside("PNG", chunk(b"eXIf", b"MM\0*" + bytes(9_000_000))),
        "too many bytes in chunks without pixels",
    ),
    "inflated profile": (
        lambda: with_inside("PNG", chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 24), 1))),
        "Decompressed data too large",
    ),
    "pixels that no row needs": (
        lambda: with_inside(
            "PNG", chunk(b"IDAT", zlib.compress(bytes(1 << 20)) + bytes(4_100_000))
        ),
        "inflates to more than twice the size of its pixels",
    ),
    "webp chunks": (
        lambda: webp_with(b"abcd\0\0\0\0" * 70_000),
        "65536 chunks",
    ),
    "bmp of 16 bits": (
        lambda: encode(photo(60, 40), "BMP").tobytes().replace(b"\x18\0", b"\x10\0", 1),
        "16 bits per pixel",
    ),
    "bmp of run lengths": (
        lambda: b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 6000, 6000, 1, 8, 1) + bytes(1064),
        "is a run-length encoded BMP",
    ),
    "animated png": (
        lambda: encode(
            photo(60, 40),
            "PNG",
            save_all=True,
            append_images=[photo(60, 40, 1)] * 2,
            default_image=True,
        ).tobytes(),
        "not one of its frames",
    ),
}


def test_an_image_above_the_limit_in_bytes_is_not_read(pictures, tmp_path):
    """As a file, as a member of a shard, and in a mixture."""
    root = shutil.copytree(pictures, tmp_path / "copy")
    names = list(scan(root).names)
    size = (root / names[1]).write_bytes(encode(photo(400, 400)).tobytes())
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for name in names[:3]:
            tar.add(root / name, name[-7:])
    for what, count in (("copy", 24), ("1.tar", 3), ("copy,1.tar=0.5", 27)):
        source = scan(",".join(str(tmp_path / part) for part in what.split(",")))
        reader = Reader(source, Data(max_mb=0.04, bad_limit=1))
        assert len({reader.read(i).index for i in range(count)}) == count - what.count(",") - 1
        wrong = f"has {size} bytes, more than data.max_mb 0.04"
        assert [row[1] for row in reader.listed()] == [wrong] * (what.count(",") + 1)


@pytest.mark.parametrize("name", HEAVY)
def test_what_costs_too_much_is_a_broken_image(name):
    make, wrong = HEAVY[name]
    with pytest.raises(ValueError, match=wrong):
        measure(np.frombuffer(make(), dtype=np.uint8), 50)


def test_what_cameras_write_is_measured():
    """A long profile, 30 scans, a preview before the picture and a film behind it."""
    exif = b"Exif\0\0" + orientation(6) + encode(photo(20, 20), progressive=True).tobytes()
    icc = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000)) * 60
    for data in (
        with_scans(20, behind=FILM),
        with_inside("JPEG", segment(0xE2, FILM) + icc + segment(0xE1, exif[:60_000])),
        webp_with(b"abcd\0\0\0\0" * 70_000, counted=False),
        with_inside("PNG", chunk(b"tEXt", b"k\0" + b"x" * 4_100_000)),
    ):
        assert sorted(measure(np.frombuffer(data, dtype=np.uint8), 50)) == [40, 60]


def test_broken_exif_prints_nothing(recwarn):
    """200 entries whose values lie outside, and then an orientation."""
    entries = b"".join(struct.pack(">HHII", i + 1, 7, 9000, 1 << 20) for i in range(200))
    exif = b"MM\0*" + struct.pack(">IH", 8, 201) + entries + struct.pack(">HHIHH", 274, 3, 1, 6, 0)
    for kind, extra in (
        ("JPEG", segment(0xE1, b"Exif\0\0" + exif)),
        ("PNG", chunk(b"eXIf", exif)),
    ):
        encoded = np.frombuffer(with_inside(kind, extra), dtype=np.uint8)
        assert measure(encoded, 50) == (40, 60)
    assert not recwarn.list


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_that_are_no_text_are_read_and_printed(backend, tmp_path, caplog):
    """A class and files whose bytes are not UTF-8, break lines or move a terminal's cursor."""
    need(backend)
    root = os.fsencode(tmp_path) + b"/caf\xe9\n\x1b[2J"
    os.mkdir(root)  # noqa: PTH102 - no text
    for i in range(4):
        with open(root + b"/%d\xff\nunic_ds: error: all is well.png" % i, "wb") as file:  # noqa: PTH123
            data = encode(photo(60, 40), "PNG").tobytes()
            file.write(data[: len(data) // 2] if i == 0 else data)
    ours = stream(tmp_path, Data(backend=backend))
    with caplog.at_level(logging.WARNING, "unic_ds.data"):
        assert set(take(ours, 1)[0].index_B.tolist()) <= {1, 2, 3}
    (record,) = caplog.records
    said = record.getMessage()
    assert said.isprintable() and said.encode()
    assert said.startswith("caf\\udce9\\n\\x1b[2J/0\\udcff\\nunic_ds: error")
    with pytest.raises(ValueError, match="4 images cannot be read") as stop:
        harmed = Reader(ours._reader.source, Data(bad_limit=0))
        harmed.mark(0, "is cut off")
        harmed.mark(1, "is cut off")
    assert all(line.isprintable() for line in str(stop.value).split("\n"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_is_in_order_and_ends(backend, pictures):
    need(backend)
    source, cfg = scan(pictures), Data(backend=backend)
    options = {"sizes": (32,), "device": CPU}
    for indices, batch, lengths in (
        ([5, 3, 3, 20, 1, 0, 9], 3, [3, 3, 1]),
        ([7], 4, [1]),
        ([], 4, []),
    ):
        batches = list(passes(source, cfg, indices=indices, batch=batch, **options))
        assert [len(b.index_B) for b in batches] == lengths
        assert [len(b.images[32]) for b in batches] == lengths
        assert [i for b in batches for i in b.index_B.tolist()] == indices
        assert [i for b in batches for i in b.position_B.tolist()] == list(range(len(indices)))
    whole = next(passes(source, cfg, indices=[4, 4, 8], batch=3, **options)).images[32]
    alone = next(passes(source, cfg, indices=[8], batch=1, **options)).images[32]
    assert torch.equal(whole[0], whole[1]) and torch.equal(whole[2], alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_shows_a_neighbour_under_its_own_number(backend, pictures, tmp_path):
    need(backend)
    root = tmp_path / "copy"
    shutil.copytree(pictures, root)
    harm(root / scan(root).names[4], "decoder")
    batches = passes(
        scan(root), Data(backend=backend), sizes=(32,), batch=4, indices=range(6), device=CPU
    )
    assert [i for b in batches for i in b.index_B.tolist()] == [0, 1, 2, 3, 5, 5]


def test_a_reader_forgets_nothing(pictures, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(pictures, root)
    source = scan(root)
    path = root / source.names[2]
    sound = path.read_bytes()
    path.write_bytes(b"")
    reader = Reader(source, Data())
    assert reader.read(2).index == 3
    path.write_bytes(sound)
    assert reader.read(2).index == 3
    assert reader.listed() == [(source.names[2], "is empty")]


PROBE = """
import sys
import torch
from unic_ds.config import Data
from unic_ds.data import Stream, scan

def first(backend):
    stream = Stream(scan(sys.argv[1]), Data(backend=backend), seed=0, sizes=(32,), batch_size=4,
                    micro=4, rank=0, world=1, device=torch.device("cpu"))
    batch = next(stream)
    stream.close()
    return len(batch.index_B)

print(first("torch"), "nvidia.dali" in sys.modules)
print(first("auto"), "nvidia.dali" in sys.modules)
sys.modules["nvidia.dali"] = None  # as if it were not installed
print(first("auto"))
try:
    first("dali")
except ValueError as error:
    print(error)
"""


def test_dali_is_imported_only_where_it_is_chosen(pictures):
    """In a new interpreter: DALI is not imported for torch; without DALI, auto uses torch."""
    command = [sys.executable, "-c", PROBE, str(pictures)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines = out.stdout.splitlines()
    assert lines[:3] == ["4 False", "4 True", "4"]
    assert "pip install -e '.[cuda" in lines[3]


def test_steps_of_other_shapes_show_the_same_samples(pictures):
    """The order does not depend on sides and micro batches; each step has its own."""
    shapes = [StepShape((32, 48), 4), StepShape((64, 16), 2), StepShape((16, 48), 8)]
    plain = take(stream(pictures), 6)
    batches = stream(pictures, micro=8, shape_of=lambda step: shapes[(step - 1) % 3])
    found = take(batches, 2 + 4 + 1)
    assert [sorted(b.images) for b in found] == [[32, 48]] * 2 + [[16, 64]] * 4 + [[16, 48]]
    assert [len(b.index_B) for b in found] == [4, 4, 2, 2, 2, 2, 8]
    for name in ("index_B", "position_B"):
        ours, theirs = (np.concatenate([getattr(b, name) for b in of]) for of in (found, plain))
        assert np.array_equal(ours, theirs)
    assert same(found[0], plain[0])
    resumed = stream(pictures, micro=8, shape_of=lambda step: shapes[(step - 1) % 3])
    resumed.seek(1)
    assert same(take(resumed, 1)[0], found[2])
