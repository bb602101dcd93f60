"""Four sets of real images with classes, as folders `sets/SET/{train,val}/CLASS`.

python tests/results/image_sets.py OUT

`solar`: the demonstration's photographs of solar cells, 4 classes. `clipart`: drawings of Debian's
openclipart-png (public domain), a class per folder of the second level. `stamps`: pictures of
tuxpaint-stamps-default (GPL-2), a class per folder. `fashion`: Fashion-MNIST of Debian's
dataset-fashion-mnist (MIT), 10 classes. Images of `val` are chosen by a hash of the file's name, in
Fashion-MNIST they are of its test set. `unlabelled`: the other drawings, without those that nearly
equal a held-out one. `lists` has text files with paths of training images: `all`, `quarter`,
`sixteenth`, and `more`, with the unlabelled ones. `quickstart` is a link to the demonstration,
whose weights students start from. The same call writes the same files.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from unic_ds import demo

CLIPART = Path("/usr/share/openclipart/png")
STAMPS = Path("/usr/share/tuxpaint/stamps")
FASHION = Path("/usr/share/datasets/fashion-mnist")
PACKAGES = {
    CLIPART: "openclipart-png",
    STAMPS: "tuxpaint-stamps-default",
    FASHION: "dataset-fashion-mnist",
}

FEWEST, MOST = 30, 100
"""Drawings of a class: smaller folders are left out, of larger ones a part is taken."""
LARGEST = 4_000_000
"""Pixels of a drawing: some have hundreds of millions, and are left out."""
SIDE = 128
"""Longer side of a drawing in pixels."""
THUMBNAIL, NEAR = 16, 4.0
"""Side of a grey copy, and the RMS difference, of 255, below which two drawings nearly equal."""
FASHION_TRAIN, FASHION_VAL = 200, 100
"""Images of a class of Fashion-MNIST."""
GARMENTS = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)


class Picture(NamedTuple):
    """An image with its place in a set."""

    side: str
    label: str
    name: str
    image: Image.Image


def rank(name: str) -> str:
    """A number, as text, that only depends on the name: in its order images are chosen."""
    return hashlib.sha256(name.encode()).hexdigest()


def split(names: list[str], share: int = 4) -> dict[str, str]:
    """Name -> `val` for a `share`-th of the names, else `train`."""
    ranked, held_out = sorted(names, key=rank), len(names) // share
    return {name: "val" if at < held_out else "train" for at, name in enumerate(ranked)}


def solar() -> Iterator[Picture]:
    """The demonstration's photographs."""
    folder = demo.prepare() / demo.PARTS[0]
    for label in sorted(x.name for x in folder.iterdir()):
        sides = split([path.stem for path in (folder / label).iterdir()])
        for name, side in sides.items():
            yield Picture(side, label, name, Image.open(folder / label / f"{name}.jpg"))


def clipart() -> Iterator[Picture]:
    """Drawings on white; equal drawings of a class count once."""
    for folder in sorted(CLIPART.glob("*/*/")):
        names = {str(path.relative_to(CLIPART)): path for path in drawings(folder)}
        if len(names) < FEWEST:
            continue
        chosen = sorted(names, key=rank)[:MOST]
        for name, side in split(chosen).items():
            label = f"{folder.parent.name}-{folder.name}"
            yield Picture(side, label, rank(name)[:16], on_white(names[name]))


def drawings(folder: Path) -> list[Path]:
    """The drawings below a folder that are not too large; of equal ones the first."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.png")):
        if not path.is_symlink() and pixels(path) <= LARGEST:
            found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    return list(found.values())


def pixels(path: Path) -> int:
    """Width times height, as a PNG's header has them."""
    with path.open("rb") as file:
        return math.prod(struct.unpack(">II", file.read(24)[16:]))


def stamps() -> Iterator[Picture]:
    """Cut-out pictures on white, a class per folder; half of them are held out, as they are few."""
    for folder in sorted(STAMPS.iterdir()):
        paths = {str(path.relative_to(STAMPS)): path for path in sorted(folder.rglob("*.png"))}
        for name, side in split(list(paths), share=2).items() if len(paths) >= FEWEST else ():
            yield Picture(side, folder.name, rank(name)[:16], on_white(paths[name]))


def on_white(path: Path) -> Image.Image:
    """A drawing with a transparent ground, centred on a white square."""
    with Image.open(path) as file:
        assert isinstance(file, PngImageFile)
        drawing = file.convert("RGBA")
    drawing.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    place = ((SIDE - drawing.width) // 2, (SIDE - drawing.height) // 2)
    square.alpha_composite(drawing, place)
    return square.convert("RGB")


def fashion() -> Iterator[Picture]:
    """The first images of each class of Fashion-MNIST's training and test set."""
    for side, prefix, count in (("train", "train", FASHION_TRAIN), ("val", "t10k", FASHION_VAL)):
        labels = idx(FASHION / f"{prefix}-labels-idx1-ubyte.gz", header=8)
        images = idx(FASHION / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        for kind, label in enumerate(GARMENTS):
            for at in np.flatnonzero(labels == kind)[:count]:
                yield Picture(side, label, f"{prefix}{at:05}", Image.fromarray(images[at]))


def unlabelled(sets: Path) -> Iterator[Picture]:
    """The drawings that are in no set, each once, without a class.

    Those that nearly equal a held-out drawing are left out: a student would be trained on it.
    """
    used = {path.stem for path in (sets / "clipart").rglob("*.png")}
    held_out = (sets / "clipart" / "val").rglob("*.png")
    held_out_NC = np.stack([thumbnail(Image.open(path)) for path in held_out])
    for path in drawings(CLIPART):
        name = rank(str(path.relative_to(CLIPART)))[:16]
        if name not in used:
            picture = on_white(path)
            difference_NC = held_out_NC - thumbnail(picture)
            if np.sqrt(np.square(difference_NC).mean(1)).min() >= NEAR:
                yield Picture("", "", name, picture)


def thumbnail(image: Image.Image) -> np.ndarray:
    """Grey values of a small copy."""
    small = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


def write(pictures: Iterator[Picture], out: Path) -> None:
    """Write pictures to a folder that appears by one rename, unless it is there."""
    if out.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / out.name
        for picture in pictures:
            folder = made / picture.side / picture.label
            folder.mkdir(parents=True, exist_ok=True)
            picture.image.save(folder / f"{picture.name}.png")
        made.rename(out)


def write_lists(out: Path) -> None:
    """Write the lists of training images."""
    train = [str(path.resolve()) for path in sorted(out.glob("sets/*/train/*/*"))]
    more = [str(path.resolve()) for path in sorted((out / "unlabelled").glob("*.png"))]
    ranked = sorted(train, key=lambda path: rank(Path(path).name))
    chosen = {
        "all": train,
        "quarter": ranked[: len(train) // 4],
        "sixteenth": ranked[: len(train) // 16],
        "more": train + more,
    }
    (out / "lists").mkdir(exist_ok=True)
    for name, paths in chosen.items():
        (out / "lists" / f"{name}.txt").write_text("".join(f"{path}\n" for path in sorted(paths)))
        print(f"{name}: {len(paths)} training images")


def idx(path: Path, header: int) -> np.ndarray:
    """Bytes of an IDX file behind its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


SETS = {"solar": solar, "clipart": clipart, "stamps": stamps, "fashion": fashion}


def main(out: Path) -> None:
    """Write what `out` does not hold yet."""
    if missing := [package for path, package in PACKAGES.items() if not path.is_dir()]:
        raise SystemExit(f"missing: {', '.join(missing)}; apt-get install {' '.join(missing)}")
    sets = out / "sets"
    sets.mkdir(parents=True, exist_ok=True)
    for name, pictures in SETS.items():
        write(pictures(), sets / name)
        count = {side: len(list((sets / name / side).rglob("*.png"))) for side in ("train", "val")}
        classes = len(list((sets / name / "train").iterdir()))
        print(f"{name}: {count['train']} + {count['val']} images, {classes} classes")
    write(unlabelled(sets), out / "unlabelled")
    if not (out / "quickstart").is_symlink():
        (out / "quickstart").symlink_to(demo.root().resolve())
    write_lists(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
