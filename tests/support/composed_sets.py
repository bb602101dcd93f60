"""Small data sets of known answers in the layouts in which larger ones are published.

    python tests/support/composed_sets.py OUT [--small]

Images are stamps on backgrounds, so masks, boxes, distances and corresponding points are exact. A
stamp is in training or in validation images, never in both. The same call writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from composed_coco import SPLITS, nuclei, write_coco, write_microscopy
from composed_scenes import (
    SMALL,
    Mask,
    Picture,
    Size,
    View,
    blended,
    depth_scene,
    layer_with,
    scene,
    views,
)
from numpy.typing import NDArray
from packaged_images import packaged
from PIL import Image
from stamps import Split, Stamp, background, classes, fine_classes, of_split, random

from unic_ds import demo

PHOTOGRAPH = "imgaug", "quokka.jpg", "quokka_depth_map_halfres.png"
VOID = 255
LONG = {"train": "training", "val": "validation"}
"""ADE20K's names of splits."""


def write_ade20k(out: Path, size: Size) -> None:
    """Masks with class + 1; 0 is other."""
    for split in SPLITS:
        for number in range(size.count(split)):
            found = scene(split, number, size)
            mask_HW = np.zeros(found.edge_HW.shape, np.uint8)
            for placed in found.placed:
                mask_HW[placed.mask_HW] = classes().index(placed.stamp.group) + 1
            name = f"ADE_{split}_{number + 1:08d}"
            save(found.image_HW3, out / "images" / LONG[split] / f"{name}.jpg")
            save(mask_HW, out / "annotations" / LONG[split] / f"{name}.png")


def write_voc(out: Path, size: Size) -> None:
    """Palette masks with 0 for the background and 255 for mixed pixels, and lists of names."""
    for split in SPLITS:
        names = [
            f"2007_{number + (split == 'val') * 500_000:06d}" for number in range(size.count(split))
        ]
        for number, name in enumerate(names):
            found = scene(split, number, size)
            mask_HW = np.zeros(found.edge_HW.shape, np.uint8)
            for placed in found.placed:
                mask_HW[placed.mask_HW] = classes().index(placed.stamp.group) + 1
            mask_HW[found.edge_HW] = VOID
            save(found.image_HW3, out / "JPEGImages" / f"{name}.jpg")
            mask = Image.fromarray(mask_HW)
            mask.putpalette(voc_palette())  # its mode becomes P
            path = out / "SegmentationClass" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask.save(path)
        write_lines(out / "ImageSets" / "Segmentation" / f"{split}.txt", names)


def voc_palette() -> list[int]:
    """VOC's colours: bits of the class from the lowest, dealt to red, green and blue."""
    return [
        sum((value >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for value in range(256)
        for channel in range(3)
    ]


def write_nyu(out: Path, size: Size) -> None:
    """Images and 16-bit depth in mm, with BTS's lists."""
    for split, folder in (("train", "sync"), ("val", "test")):
        pairs = []
        for number in range(size.count(split)):
            found = depth_scene(split, number, size)
            pairs.append((found.image_HW3, found.depth_HW))
        write_depth(out, split, folder, pairs)


def write_depth(
    out: Path, split: Split, folder: str, pairs: Iterable[tuple[Picture, NDArray[np.uint16]]]
) -> None:
    """Write images, depth maps and the list of a split."""
    lines = []
    for number, (image_HW3, depth_HW) in enumerate(pairs):
        rgb = f"scene_{number % 3}/rgb_{number:05d}.jpg"
        depth = f"scene_{number % 3}/sync_depth_{number:05d}.png"
        save(image_HW3, out / folder / rgb)
        save(depth_HW, out / folder / depth)
        lines.append(f"/{rgb} /{depth} 518.8579")
    name = {"train": "train", "val": "test"}[split]
    write_lines(out / f"nyudepthv2_{name}_files_with_gt.txt", lines)


def write_photograph(out: Path, size: Size) -> None:
    """Crops of a photograph with a depth map: its left 36 % for validation, the rest for training.

    The map has no unit: it is taken as 5 m where it is black to 1 m where it is white.
    """
    found = packaged(*PHOTOGRAPH)
    if found is None:
        return
    depth_image = Image.open(found[1]).convert("L")
    image = Image.open(found[0]).convert("RGB").resize(depth_image.size, Image.Resampling.BOX)
    width, height = image.size
    border = round(0.36 * width)
    for split, folder, left, right in (
        ("train", "sync", border, width),
        ("val", "test", 0, border),
    ):
        pairs = []
        for number in range(max(4, size.count(split) // 3)):
            draw = random("photograph", split, number)
            w = int(draw.integers(120, right - left))
            h = w * 3 // 4
            x, y = int(draw.integers(left, right - w + 1)), int(draw.integers(0, height - h + 1))
            box = (x, y, x + w, y + h)
            side = (size.side, size.side * 3 // 4)
            rgb_HW3 = np.asarray(image.resize(side, Image.Resampling.BICUBIC, box))
            grey_HW = np.asarray(depth_image.resize(side, Image.Resampling.NEAREST, box))
            depth_HW = np.rint(5000 - grey_HW / 255 * 4000).astype(np.uint16)
            flip = slice(None, None, -1 if draw.random() < 0.5 else 1)
            pairs.append((rgb_HW3[:, flip], depth_HW[:, flip]))
        write_depth(out, split, folder, pairs)


def write_spair(out: Path, size: Size) -> None:
    """Pairs of the same stamp; its keypoints are those of a similarity transform."""
    for split, name in (("train", "trn"), ("val", "test")):
        lines = []
        for number in range(size.count(split)):
            stamp, source, target = views(split, number, size)
            names = [f"{split}{number:04d}_{side}" for side in "ab"]
            for file, seen in zip(names, (source, target), strict=True):
                save(seen.image_HW3, out / "JPEGImages" / stamp.group / f"{file}.jpg")
            pair = f"{number:06d}-{names[0]}-{names[1]}:{stamp.group}"
            text = json.dumps(spair_pair(stamp, names, source, target))
            write_text(out / "PairAnnotation" / name / f"{pair}.json", text)
            lines.append(pair)
        write_lines(out / "Layout" / "large" / f"{name}.txt", lines)


def spair_pair(stamp: Stamp, names: Sequence[str], source: View, target: View) -> dict[str, Any]:
    """The annotation of a pair."""
    row: dict[str, Any] = {"category": stamp.group, "mirror": 0}
    for key, name, seen in (("src", names[0], source), ("trg", names[1], target)):
        height, width = seen.mask_HW.shape
        row[f"{key}_imname"] = f"{name}.jpg"
        row[f"{key}_imsize"] = [width, height, 3]
        row[f"{key}_bndbox"] = box_of(seen.mask_HW)
        row[f"{key}_kps"] = seen.point_K2.round(3).tolist()
    row["kps_ids"] = [str(number) for number in range(len(source.point_K2))]
    return row


def box_of(mask_HW: Mask) -> list[int]:
    """x0, y0, x1, y1 around a mask."""
    row_N, column_N = np.nonzero(mask_HW)
    return [
        *(int(column_N.min()), int(row_N.min())),
        *(int(column_N.max()) + 1, int(row_N.max()) + 1),
    ]


def write_classes(out: Path, size: Size) -> None:
    """Class folders of stamps by group."""
    for split in SPLITS:
        for name in classes():
            members = [stamp for stamp in of_split(split) if stamp.group == name]
            write_class(out / split / name, members, split, size.count(split), size)


def write_transfer(out: Path, size: Size) -> None:
    """Class folders of stamps by fine class, of the demonstration's cells, and of nuclei."""
    for split in SPLITS:
        for name in fine_classes():
            members = [stamp for stamp in of_split(split) if stamp.fine == name]
            count = max(2, size.count(split) // 4)
            write_class(out / "stamps" / split / name, members, split, count, size)
    if demo.ready():
        write_cells(out / "cells", size)
    if found := nuclei():
        write_nuclei(out / "nuclei", *found)


def write_class(
    folder: Path, members: Sequence[Stamp], split: Split, count: int, size: Size
) -> None:
    """`count` images of stamps, each in the middle of a background, in turn."""
    for number in range(count):
        draw, side = random("class", split, folder.name, number), size.side
        stamp = members[number % len(members)]
        picture = stamp.sized(round(side * draw.uniform(0.6, 0.95)), flip=draw.random() < 0.5)
        corner = (side - np.array(picture.shape[:2])) // 2
        layer = layer_with(picture, side, side, tuple(corner))
        image = blended(background(side, side, draw, noise=size.noise), layer)
        name = f"{number:04d}_{stamp.name.replace('/', '.')}.jpg"
        save(image, folder / name)


def write_cells(out: Path, size: Size) -> None:
    """The first photographs of solar cells of each of the demonstration's classes."""
    for folder in sorted((demo.root() / "images").iterdir()):
        paths = sorted(folder.iterdir())
        for split, start in (("train", 0), ("val", size.train)):
            for path in paths[start : start + size.count(split)]:
                target = out / split / folder.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())


def write_nuclei(out: Path, image_HW: NDArray[np.uint8], mask_HW: NDArray[np.uint16]) -> None:
    """Squares of 48 pixels, with their middle in a nucleus or not; the last quarter validates."""
    side, half = 48, 24
    middles = [(y, x) for y in range(half, 512 - half, 32) for x in range(half, 512 - half, 32)]
    for y, x in middles:
        if y - half < 384 < y + half:
            continue  # no square is in both splits
        split = "train" if y < 384 else "val"
        name = "nucleus" if mask_HW[y, x] else "gap"
        part = image_HW[y - half : y - half + side, x - half : x - half + side]
        save(part, out / split / name / f"{y:03d}_{x:03d}.jpg")


def save(pixels: NDArray[Any], path: Path) -> None:
    """Write an image in the format of its name, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text."""
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    """Write text, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


SETS: dict[str, Callable[[Path, Size], None]] = {
    "ade20k": write_ade20k,
    "voc": write_voc,
    "coco": write_coco,
    "microscopy": write_microscopy,
    "nyu": write_nyu,
    "photograph": write_photograph,
    "spair": write_spair,
    "classes": write_classes,
    "transfer": write_transfer,
}
"""Folder of a set below OUT -> the function that writes it."""


def compose(out: Path, size: Size = SMALL, names: Iterable[str] = tuple(SETS)) -> Path:
    """Write sets below `out`, which must not have them; those of missing packages are left out."""
    for name in names:
        SETS[name](out / name, size)
    return out


def main() -> None:
    """Write the sets that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="as tests have them")
    parser.add_argument("--only", nargs="+", choices=SETS, default=tuple(SETS))
    for name in ("side", "train", "val"):
        parser.add_argument(f"--{name}", type=int, help=f"default: {getattr(Size(), name)}")
    given = vars(parser.parse_args())
    size = SMALL if given["small"] else Size()
    chosen = {key: given[key] for key in ("side", "train", "val") if given[key]}
    compose(given["out"], Size(**(vars(size) | chosen)), given["only"])
    for name in given["only"]:
        count = sum(path.is_file() for path in (given["out"] / name).rglob("*"))
        print(f"{given['out'] / name}: {count} files" if count else f"{name}: not installed")


if __name__ == "__main__":
    main()
