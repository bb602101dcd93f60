"""DALI and the torch decoder agree after every operation, on every kind of file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from augmentation_cases import CASES, OPERATIONS, SIZES, drawn
from pictures import encode, orientation, photo
from PIL import Image, ImageChops

from unic_ds.config import Data
from unic_ds.data import torch_decoder
from unic_ds.data.reader import Undecodable, measure

dali = pytest.importorskip("nvidia.dali", reason="nvidia-dali-cuda130 is not installed")
CPU = torch.device("cpu")


def decoders(cfg, device=CPU, batch=6, depth=1):
    from unic_ds.data import dali_decoder

    options = {"batch": batch, "depth": depth, "threads": 2, "colour": cfg.augment == "unic"}
    return [
        make(len(SIZES), reference=SIZES[0], device=device, **options)
        for make in (dali_decoder.Decoder, torch_decoder.Decoder)
    ]


def both(encoded, cfg, device=CPU):
    """The images of either decoder, DALI's first."""
    answers = []
    for decoder in decoders(cfg, device, batch=len(encoded)):
        decoder.push(encoded, drawn(encoded, cfg), SIZES)
        answers.append(decoder.pop())
        decoder.close()
    return answers


def distance(ours, theirs):
    """Mean grey levels between two uint8 batches, per image; the worst."""
    return (ours.float() - theirs.float()).abs().mean((1, 2, 3)).max().item()


@pytest.fixture(scope="module")
def photos():
    return [encode(photo(300 - 40 * i, 200 + 30 * i, seed=i)) for i in range(6)]


@pytest.fixture(scope="module")
def solar_cells():
    data = pytest.importorskip("elpv_dataset.utils", reason="elpv-dataset is not installed")
    cells = data.load_dataset()[0][::450]
    return [encode(Image.fromarray(cell).convert("RGB")) for cell in cells]


@pytest.mark.parametrize("name", CASES)
def test_photos_agree_after_every_operation(name, photos):
    ours, theirs = both(photos, CASES[name])
    for size in SIZES:
        assert ours[size].shape == theirs[size].shape == (6, 3, size, size)
        assert ours[size].dtype == theirs[size].dtype == torch.uint8
        assert ours[size].is_contiguous() and theirs[size].is_contiguous()
        assert distance(ours[size], theirs[size]) < 2


@pytest.mark.parametrize("name", ["crop", "contrast", "blur", "unic"])
def test_solar_cells_agree(name, solar_cells):
    ours, theirs = both(solar_cells, CASES[name])
    assert all(distance(ours[size], theirs[size]) < 2 for size in SIZES)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "crop"])
def test_every_operation_does_something(name, photos):
    plain, changed = both(photos, CASES["crop"])[0], both(photos, CASES[name])[0]
    assert all(distance(plain[size], changed[size]) > 3 for size in SIZES)


def test_all_sizes_show_the_same_picture(photos):
    images = both(photos, Data())[1]
    small_B3HW = torch.nn.functional.interpolate(images[224].float(), size=98, mode="area")
    near_B3HW = torch.nn.functional.interpolate(images[112].float(), size=98, mode="area")
    assert distance(small_B3HW, images[98]) < 12
    assert distance(near_B3HW, images[98]) < 12
    assert distance(small_B3HW.roll(1, 0), images[98]) > 30


def test_flip_and_window_are_what_they_say():
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, :30], pixels[:20, 30:], pixels[20:, :30] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    encoded = [encode(Image.fromarray(pixels), "PNG")] * 2
    draws = drawn(encoded, Data(augment="none"))._replace(
        window_B4=np.array([[0, 0, 60, 20], [0, 20, 60, 20]], dtype=np.int32),
        flip_B=np.array([False, True]),
    )
    for decoder in decoders(Data(augment="none"), batch=2):
        decoder.push(encoded, draws, SIZES)
        image_B3HW = decoder.pop()[112]
        assert image_B3HW[0, :, 50, 20].tolist() == [255, 0, 0]
        assert image_B3HW[0, :, 50, 90].tolist() == [0, 255, 0]
        assert image_B3HW[1, :, 50, 20].tolist() == [0, 0, 0]
        assert image_B3HW[1, :, 50, 90].tolist() == [0, 0, 255]


def without_adobe(encoded):
    """A JPEG without the Adobe segment, which has the colour space of four components."""
    data = encoded.tobytes()
    at = data.index(b"\xff\xee")
    return np.frombuffer(data[:at] + data[at + 2 + data[at + 3] :], dtype=np.uint8)


def chunk(name, payload):
    """A chunk of a PNG."""
    body = name + payload
    return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))


def deep_png(image_HWC, kind):
    """A PNG of 16 bits a channel, which PIL does not write."""
    height, width = image_HWC.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in image_HWC.astype(">u2"))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return np.frombuffer(data, dtype=np.uint8)


def turned_behind_its_pixels(encoded, value):
    """A PNG with an orientation after its pixels, as ExifTool writes it."""
    data = encoded.tobytes()
    late = chunk(b"eXIf", orientation(value).removeprefix(b"Exif\0\0"))
    return np.frombuffer(data[:-12] + late + data[-12:], dtype=np.uint8)


def kinds():
    """Files that decode, by name of the special case."""
    rgb = photo(120, 80)
    alpha = Image.fromarray(np.dstack([np.asarray(rgb), np.full((80, 120), 99, np.uint8)]))
    grey16 = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    more = {"save_all": True, "append_images": [photo(120, 80, seed=1)]}
    deep = np.asarray(rgb).astype(np.uint16) * 257
    ycck = encode(rgb.convert("CMYK"))
    ycck[ycck.tobytes().index(b"Adobe") + 11] = 2
    files = {
        "grey": encode(rgb.convert("L")),
        "cmyk": encode(rgb.convert("CMYK")),
        "cmyk without adobe": without_adobe(encode(ImageChops.invert(rgb.convert("CMYK")))),
        "ycck": ycck,
        "grey and alpha": encode(rgb.convert("LA"), "PNG"),
        "palette and alpha": encode(rgb.convert("P"), "PNG", transparency=3),
        "rgb 16 bit": deep_png(deep, 2),
        "grey and alpha 16 bit": deep_png(deep[:, :, :2], 4),
        "animated png": encode(rgb, "PNG", **more),
        "animated webp": encode(rgb, "WEBP", **more),
        "bmp palette": encode(rgb.convert("P"), "BMP"),
        "progressive": encode(rgb, progressive=True),
        "png": encode(rgb, "PNG"),
        "palette": encode(rgb.convert("P"), "PNG"),
        "alpha": encode(alpha, "PNG"),
        "16 bit": encode(grey16, "PNG"),
        "1 bit": encode(rgb.convert("L").point(lambda v: 255 * (v > 127)).convert("1"), "PNG"),
        "webp": encode(rgb, "WEBP"),
        "webp lossless": encode(rgb, "WEBP", lossless=True),
        "webp turned": encode(rgb, "WEBP", exif=orientation(6)),
        "bmp": encode(rgb, "BMP"),
        "png turned": encode(rgb, "PNG", exif=orientation(8)),
        "png turned late": turned_behind_its_pixels(encode(rgb, "PNG"), 6),
        "exif without a type": encode(
            rgb, exif=orientation(6).replace(b"\x12\0\3\0\0", b"\x12\0\x63\0\0")
        ),
        "exif of too many": encode(
            rgb, exif=orientation(6).replace(b"\0\1\1\x12", b"\1\xf4\1\x12")
        ),
        "broken exif": encode(rgb, exif=b"Exif\0\0not a TIFF header"),
    }
    return files | {f"exif {i}": encode(rgb, exif=orientation(i)) for i in range(1, 9)}


KINDS = kinds()


def test_every_kind_of_file_agrees_and_shows_the_picture():
    encoded = list(KINDS.values())
    ours, theirs = both(encoded, Data(augment="weak", flip=0))
    assert distance(ours[112], theirs[112]) < 2
    plain = both([KINDS["png"]], Data(augment="none"))[0][112]
    square = decoders(Data(augment="none"), batch=1)[0]
    for name in (
        "cmyk",
        "cmyk without adobe",
        "rgb 16 bit",
        "progressive",
        "alpha",
        "webp",
        "webp lossless",
        "bmp",
        "exif 1",
    ):
        square.push([KINDS[name]], drawn([KINDS[name]], Data(augment="none")), SIZES)
        assert distance(square.pop()[112], plain) < 6, name


@pytest.mark.parametrize("name", ["exif 3", "exif 5", "exif 6", "exif 8", "webp turned"])
def test_orientation_is_applied_before_the_window(name):
    """Both decoders against PIL, which turns the whole picture first."""
    from PIL import ImageOps

    with Image.open(io.BytesIO(KINDS[name].tobytes())) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert measure(KINDS[name], 50) == upright.size
    x, y, w, h = 10, 30, 60, 40
    window = np.array([[x, y, w, h]], dtype=np.int32)
    draws = drawn([KINDS[name]], Data(augment="none"))._replace(window_B4=window)
    want = upright.crop((x, y, x + w, y + h)).resize((112, 112), Image.Resampling.BICUBIC)
    want_3HW = torch.from_numpy(np.asarray(want).copy()).permute(2, 0, 1)
    for decoder in decoders(Data(augment="none"), batch=1):
        decoder.push([KINDS[name]], draws, SIZES)
        assert distance(decoder.pop()[112], want_3HW[None]) < 2


@pytest.mark.parametrize("side", [(1, 1), (1, 90), (90, 1), (3, 2)])
def test_tiny_images_decode(side):
    for kind in ("JPEG", "PNG"):
        ours, theirs = both([encode(photo(200, 200).resize(side), kind)], Data())
        assert distance(ours[112], theirs[112]) < 2


@pytest.mark.parametrize("which", [0, 1], ids=["dali", "torch"])
def test_batches_come_in_order_and_survive_a_restart(which, photos):
    cfg = Data()
    decoder = decoders(cfg, batch=4, depth=2)[which]
    batches = [photos[:4], photos[4:], photos[1:4]]

    def push(k):
        decoder.push(batches[k], drawn(batches[k], cfg, seed=k), SIZES)

    push(0), push(1)
    first = decoder.pop()[112].clone()
    push(2)
    second, third = decoder.pop()[112], decoder.pop()[112]
    assert [len(first), len(second), len(third)] == [4, 2, 3]
    kept = first.clone()
    decoder.restart()
    push(0)  # fewer than `depth`
    assert torch.equal(decoder.pop()[112], first)
    assert torch.equal(first, kept)
    decoder.close()


@pytest.mark.parametrize("which", [0, 1], ids=["dali", "torch"])
def test_sides_may_differ_from_batch_to_batch(which, photos):
    """One decoder gives the images of a decoder for each side; blur keeps its reference."""
    cfg = Data(blur=1.0, blur_min=2.0)
    changing, fixed = (decoders(cfg, batch=6, depth=2)[which] for _ in range(2))
    draws = drawn(photos, cfg)
    sides = [SIZES, (64, 224, 96), (64, 64, 64), SIZES]
    for batch in sides[:2]:
        changing.push(photos, draws, batch)
    for k, batch in enumerate(sides):
        found = changing.pop()
        if k + 2 < len(sides):
            changing.push(photos, draws, sides[k + 2])
        assert found.keys() == set(batch)
        fixed.push(photos, draws, batch)
        for side, image_B3HW in fixed.pop().items():
            assert torch.equal(found[side], image_B3HW)
            assert image_B3HW.shape == (6, 3, side, side)
        fixed.restart()

    changing.close(), fixed.close()


@pytest.mark.parametrize("which", [0, 1], ids=["dali", "torch"])
def test_a_broken_image_is_told_and_a_restart_heals(which, photos):
    cfg = Data()
    decoder = decoders(cfg, batch=2, depth=2)[which]
    png = encode(photo(80, 60), "PNG")
    draws = drawn([photos[0], png], cfg)
    decoder.push([photos[0], png[:-200]], draws, SIZES)
    decoder.push([photos[0], png], draws, SIZES)
    with pytest.raises(Undecodable, match=r"\w"):
        decoder.pop()
    decoder.restart()
    decoder.push([photos[0], png], draws, SIZES)
    assert decoder.pop()[112].shape == (2, 3, 112, 112)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", CASES)
def test_the_gpu_agrees_with_the_torch_decoder(name, photos):
    """nvJPEG is not libjpeg: a wider bound than on the CPU."""
    ours, theirs = both(photos, CASES[name], torch.device("cuda"))
    for size in SIZES:
        assert ours[size].is_cuda and theirs[size].is_cuda
        assert distance(ours[size], theirs[size]) < 4
