"""COCO's layout: composed scenes, and the quadrants of a microscopy image with its nuclei."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from composed_scenes import Mask, Picture, Placed, Scene, Size, empty_scene, scene
from numpy.typing import NDArray
from packaged_images import packaged
from PIL import Image
from stamps import Split, classes

SPLITS: tuple[Split, ...] = ("train", "val")
MICROSCOPY = "stardist", "data/images/img2d.tif", "data/images/mask2d.tif"
LEAST_AREA = 4


def write_coco(out: Path, size: Size) -> None:
    """Scenes with boxes, masks and crowds; one training image is empty."""
    for split in SPLITS:
        scenes = [scene(split, number, size) for number in range(size.count(split))]
        if split == "train":
            scenes.append(empty_scene(split, size))
        write_split(out, split, [annotated(found) for found in scenes], list(classes()))


def annotated(found: Scene) -> tuple[Picture, list[tuple[int, Mask, bool]]]:
    """The image and (class, mask, crowd) of each object."""

    def row(placed: Placed) -> tuple[int, Mask, bool]:
        return classes().index(placed.stamp.group), placed.mask_HW, placed.crowd

    return found.image_HW3, [row(placed) for placed in found.placed]


def write_split(
    out: Path,
    split: Split,
    images: list[tuple[Picture, list[tuple[int, Mask, bool]]]],
    names: list[str],
) -> None:
    """Write JPEG images and the JSON file of a split; category ids are odd, as COCO's have gaps."""
    folder = out / f"{split}2017"
    folder.mkdir(parents=True)
    (out / "annotations").mkdir(exist_ok=True)
    ids = count(1)
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (image_HW3, objects) in enumerate(images, 1):
        file = f"{number:012d}.jpg"
        Image.fromarray(image_HW3).save(folder / file, quality=95)
        height, width = image_HW3.shape[:2]
        rows.append({"id": number, "file_name": file, "width": width, "height": height})
        for place, mask_HW, crowd in objects:
            annotations.append(
                {"id": next(ids), "image_id": number, "category_id": 2 * place + 1}
                | instance(mask_HW, crowd=crowd)
            )
    categories = [
        {"id": 2 * place + 1, "name": name, "supercategory": "thing"}
        for place, name in enumerate(names)
    ]
    text = json.dumps({"images": rows, "annotations": annotations, "categories": categories})
    (out / "annotations" / f"instances_{split}2017.json").write_text(text)


def instance(mask_HW: Mask, *, crowd: bool) -> dict[str, Any]:
    """COCO's fields of an object: polygons if it has no hole and is no crowd, else run lengths."""
    row_N, column_N = np.nonzero(mask_HW)
    x, y = int(column_N.min()), int(row_N.min())
    polygons = None if crowd else outlines(mask_HW)
    return {
        "bbox": [x, y, int(column_N.max()) - x + 1, int(row_N.max()) - y + 1],
        "area": len(row_N),
        "iscrowd": int(crowd),
        "segmentation": polygons or run_lengths(mask_HW),
    }


def run_lengths(mask_HW: Mask) -> dict[str, list[int]]:
    """Lengths of runs down the columns, of 0 first."""
    pixel_N = np.concatenate([[False], mask_HW.ravel(order="F")])
    ends = np.append(np.flatnonzero(pixel_N[1:] != pixel_N[:-1]), mask_HW.size)
    return {"counts": np.diff(ends, prepend=0).tolist(), "size": list(mask_HW.shape)}


def outlines(mask_HW: Mask) -> list[list[int]] | None:
    """Polygons along the pixels' edges; None if one has a hole or touches itself at a corner."""
    follows: dict[tuple[int, int], tuple[int, int]] = {}
    for start, end in pixel_edges(mask_HW):
        if start in follows:
            return None
        follows[start] = end
    polygons = []
    while follows:
        loop = [next(iter(follows))]
        while (corner := follows.pop(loop[-1])) != loop[0]:
            loop.append(corner)
        corner_N2 = np.array(loop)
        before_N2, after_N2 = np.roll(corner_N2, 1, 0), np.roll(corner_N2, -1, 0)
        if (corner_N2[:, 0] * after_N2[:, 1] - corner_N2[:, 1] * after_N2[:, 0]).sum() < 0:
            return None
        turns_N = ((after_N2 - corner_N2) != (corner_N2 - before_N2)).any(1)
        polygons.append(corner_N2[turns_N].ravel().tolist())
    return polygons


def pixel_edges(mask_HW: Mask) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Edges between mask and rest as (x, y) -> (x, y), with the mask on their right."""
    padded = np.pad(mask_HW, 1)
    inside = padded[1:-1, 1:-1]
    sides = {
        (0, 0, 1, 0): padded[:-2, 1:-1],
        (1, 0, 1, 1): padded[1:-1, 2:],
        (1, 1, 0, 1): padded[2:, 1:-1],
        (0, 1, 0, 0): padded[1:-1, :-2],
    }
    for (x0, y0, x1, y1), neighbour in sides.items():
        for y, x in np.argwhere(inside & ~neighbour).tolist():
            yield (x + x0, y + y0), (x + x1, y + y1)


def nuclei() -> tuple[NDArray[np.uint8], NDArray[np.uint16]] | None:
    """The microscopy image in grey [512, 512] and the number of each pixel's nucleus, 0: none.

    None if the package is not installed.
    """
    found = packaged(*MICROSCOPY)
    if found is None:
        return None
    image_HW, mask_HW = (np.asarray(Image.open(path)) for path in found)
    bright = float(np.percentile(image_HW, 99.8))
    return (image_HW / bright * 255).clip(0, 255).astype(np.uint8), mask_HW


def write_microscopy(out: Path, size: Size) -> None:
    """Three quadrants for training, one for validation; `size` does not matter.

    Nuclei on the border of two quadrants are in both, cut.
    """
    found = nuclei()
    if found is None:
        return
    image_HW, mask_HW = found
    parts = [np.s_[y : y + 256, x : x + 256] for y in (0, 256) for x in (0, 256)]
    images = []
    for part in parts:
        numbers = [number for number in np.unique(mask_HW[part]).tolist() if number]
        masks = [mask_HW[part] == number for number in numbers]
        objects = [(0, mask, False) for mask in masks if mask.sum() >= LEAST_AREA]
        images.append((np.repeat(image_HW[part][..., None], 3, 2), objects))
    write_split(out, "train", images[:3], ["nucleus"])
    write_split(out, "val", images[3:], ["nucleus"])
