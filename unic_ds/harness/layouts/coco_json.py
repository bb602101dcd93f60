"""COCO's annotation file: images, their instances and the classes, checked one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unic_ds.files import read_limited
from unic_ds.files.printable import printable
from unic_ds.harness.layouts import coco_masks
from unic_ds.harness.layouts.coco_masks import Mask
from unic_ds.harness.layouts.sample_files import stays_inside
from unic_ds.process import console

LARGEST = 2 << 30
"""Bytes of the largest annotation file; COCO's training set has 450 MB."""
SMALLEST = 0.01
"""Pixels of the shortest side of a box; COCO's training set has two boxes without height."""
BEYOND = 1.0
"""Pixels that a box may reach beyond its image, by rounding."""
MASKS = 1 << 31
"""Pixels of the masks of one image, and bytes when they are read."""
WIDEST = 1_000_000


class Image(NamedTuple):
    """An image and its M instances."""

    name: str
    """Path below the folder of images."""
    width: int
    height: int
    box_M4: NDArray[np.float32]
    """x0, y0, x1, y1."""
    class_M: NDArray[np.int64]
    crowd_M: NDArray[np.bool_]
    mask_M: tuple[Mask | None, ...]


class Instance(NamedTuple):
    """An annotation."""

    box_4: tuple[float, float, float, float]
    label: int
    crowd: bool
    mask: Mask | None


class Described(NamedTuple):
    """The content of an annotation file."""

    images: tuple[Image, ...]
    """In the order of the file."""
    classes: tuple[str, ...]
    """Names in the order of the categories' ids."""
    digest: str = ""
    """SHA-256 of the file."""

    @property
    def masks(self) -> bool:
        """True if there are instances, and all have masks."""
        found = [mask for image in self.images for mask in image.mask_M]
        return bool(found) and all(found)


def read(file: Path) -> Described:
    """The content of a file; ValueError of one sentence that names what is wrong."""
    try:
        encoded = read_limited(file, LARGEST)
        found = json.loads(encoded)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return parse(found, file)._replace(digest=hashlib.sha256(encoded).hexdigest())
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error.strerror or error})") from None
    except RecursionError:
        raise ValueError(f"{str(file)!r} is nested too deeply for an annotation file") from None
    except ValueError as error:
        raise ValueError(
            f"{str(file)!r} is no annotation file as COCO's: {printable(error)}; correct it"
        ) from None


def parse(found: Mapping[str, object], file: Path) -> Described:
    """The content of a JSON object; ValueError of one clause."""
    names = categories(rows_of(found, "categories"))
    labels = {number: label for label, number in enumerate(sorted(names))}
    rows = {}
    for row in rows_of(found, "images"):
        number, image = image_of(row)
        if number in rows:
            raise ValueError(f"the image id {number} is given twice")
        rows[number] = (image, list[Instance]())
    flat = 0
    for row in rows_of(found, "annotations"):
        number = whole(row, "image_id")
        if number not in rows:
            raise ValueError(f"{named(row)} has the image_id {number}, which no image has")
        image, instances = rows[number]
        instance = instance_of(row, image, labels)
        if instance is None:
            flat += 1
        else:
            instances.append(instance)
    if flat:
        console.say(f"{printable(file)}: {flat} boxes without an area are left out")
    images = tuple(with_instances(image, instances) for image, instances in rows.values())
    return Described(images, tuple(names[number] for number in sorted(names)))


def rows_of(found: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    """The objects of a list that is not empty."""
    rows = found.get(key)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"it has no {key!r}")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key!r} has entries that are no objects")
    return rows


def categories(rows: Sequence[Mapping[str, object]]) -> dict[int, str]:
    """Names by identifier."""
    names = {whole(row, "id"): str(row.get("name", row["id"])) for row in rows}
    if len(names) < len(rows):
        raise ValueError("two categories have the same id")
    return names


def image_of(row: Mapping[str, object]) -> tuple[int, Image]:
    """An image's identifier and facts."""
    name, width, height = row.get("file_name"), whole(row, "width"), whole(row, "height")
    if not stays_inside(name):
        raise ValueError(f"the file_name {name!r} is no path below the folder of images")
    if not (0 < width <= WIDEST and 0 < height <= WIDEST):
        raise ValueError(f"the image {name!r} has {width} x {height} pixels")
    none = np.zeros((0, 4), dtype=np.float32)
    classes, crowds = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    return whole(row, "id"), Image(str(name), width, height, none, classes, crowds, ())


def instance_of(
    row: Mapping[str, object], image: Image, labels: Mapping[int, int]
) -> Instance | None:
    """An annotation, its box clipped to the image; None if the box has no area."""
    where = f"{named(row)} of the image {image.name!r}"
    category = whole(row, "category_id")
    if category not in labels:
        raise ValueError(f"{where} has the category_id {category}, which no category has")
    box = row.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_finite, box))):
        raise ValueError(f"{where} has no bbox of four numbers")
    x, y, width, height = map(float, box)
    outside = max(-x, -y, x + width - image.width, y + height - image.height) > BEYOND
    if outside or width < 0 or height < 0:
        raise ValueError(
            f"{where} has the bbox {box} in {image.width} x {image.height} pixels, but a bbox is"
            " x, y, width, height inside the image"
        )
    x1, y1 = min(x + width, image.width), min(y + height, image.height)
    x0, y0 = max(x, 0.0), max(y, 0.0)
    if min(x1 - x0, y1 - y0) < SMALLEST:
        return None
    try:
        mask = coco_masks.parse(row.get("segmentation"))
    except ValueError as error:
        raise ValueError(f"the segmentation of {where} {error}") from None
    return Instance((x0, y0, x1, y1), labels[category], bool(row.get("iscrowd")), mask)


def with_instances(image: Image, instances: Sequence[Instance]) -> Image:
    """The image with its instances; ValueError if their masks have too many pixels."""
    masks = sum(one.mask is not None for one in instances)
    if masks * image.width * image.height > MASKS:
        raise ValueError(
            f"the image {image.name!r} has {masks} masks of {image.width} x"
            f" {image.height} pixels, more than {MASKS} in all"
        )
    return image._replace(
        box_M4=np.array([one.box_4 for one in instances], dtype=np.float32).reshape(-1, 4),
        class_M=np.array([one.label for one in instances], dtype=np.int64),
        crowd_M=np.array([one.crowd for one in instances], dtype=bool),
        mask_M=tuple(one.mask for one in instances),
    )


def whole(row: Mapping[str, object], key: str) -> int:
    """A whole number; ValueError with the key."""
    value = row.get(key)
    if type(value) is not int:
        raise ValueError(f"{key} {value!r} is no whole number")
    return value


def is_finite(value: object) -> bool:
    """True for a number of JSON that is neither NaN nor beyond a million."""
    return type(value) in (int, float) and -WIDEST <= value <= WIDEST  # type: ignore[operator]


def named(row: Mapping[str, object]) -> str:
    """An annotation by its identifier."""
    return f"the annotation {row.get('id')!r}"
