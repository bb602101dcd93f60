"""COCO's layout: `annotations/instances_{train,val}*.json` beside folders of images.

`instances_train2017.json` describes the images of `train2017/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unic_ds.config import Config, Data
from unic_ds.evaluate.features import Annotation
from unic_ds.evaluate.samples import BoxedImage, UnreadableImage
from unic_ds.files.printable import printable
from unic_ds.harness.layouts import coco_json, coco_masks, sample_files
from unic_ds.harness.layouts.coco_json import Described, Image
from unic_ds.process import console

ANNOTATIONS, PREFIX = "annotations", "instances_"
CHECKED = 100
"""Images whose headers are compared with the annotations before anything is computed."""


@dataclass(frozen=True)
class Coco:
    """Images with instances (`samples.SampleSet` of BoxedImage)."""

    folder: Path
    """Of the images."""
    name: str
    images: tuple[Image, ...]
    classes: tuple[str, ...]
    limits: Data
    annotations: frozenset[Annotation]
    digest: str
    """SHA-256 of the annotation file."""

    @cached_property
    def identity(self) -> str:
        """Hash of the images' names, sizes and times, and of the annotation file."""
        files = [self.folder / image.name for image in self.images]
        return sample_files.identity(files, self.digest, sorted(self.annotations))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, place: int) -> BoxedImage:
        """Decode an image and draw its masks; UnreadableImage if one is broken."""
        image = self.images[place]
        file = self.folder / image.name
        image_3HW = sample_files.read_image(file, self.limits)
        height, width = image_3HW.shape[1:]
        check_size(image, width, height, file)
        mask_MHW = self.masks_of(image) if "masks" in self.annotations else None
        return BoxedImage(
            image_3HW,
            torch.from_numpy(image.box_M4),
            torch.from_numpy(image.class_M),
            torch.from_numpy(image.crowd_M),
            mask_MHW,
        )

    def masks_of(self, image: Image) -> Tensor:
        """Masks (M, H, W) of an image's instances."""
        found = torch.zeros(len(image.mask_M), image.height, image.width, dtype=torch.bool)
        for mask_HW, mask in zip(found, image.mask_M, strict=True):
            assert mask is not None
            try:
                drawn_HW = coco_masks.drawn(mask, image.height, image.width)
            except ValueError as error:
                raise UnreadableImage(f"{printable(self.folder / image.name)} {error}") from error
            mask_HW.copy_(torch.from_numpy(drawn_HW))
        return found


def open_sets(folder: Path, cfg: Config) -> dict[str, Coco]:
    """The training images that have objects, and the validation images.

    At most `eval.max_train` and `eval.max_val` of them. ValueError for a folder of another layout,
    an annotation file that is not COCO's, or images that are missing or of another size.
    """
    files = {name: annotation_file(folder, name) for name in ("train", "val")}
    found = {name: coco_json.read(file) for name, file in files.items()}
    train, val = found["train"], found["val"]
    if train.classes != val.classes:
        raise ValueError(
            f"{str(files['train'])!r} has {len(train.classes)} categories, and"
            f" {str(files['val'])!r} {len(val.classes)} or of other names; use the same in both"
        )
    with_objects = tuple(image for image in train.images if not image.crowd_M.all())
    found["train"] = train._replace(images=with_objects)
    for name, side in found.items():
        if all(image.crowd_M.all() for image in side.images):
            raise ValueError(f"{str(files[name])!r} has no object that is not a crowd; add some")
    annotations = annotations_of(found["train"], val)
    limits = {"train": cfg.eval.max_train, "val": cfg.eval.max_val}
    sets = {}
    for name, side in found.items():
        chosen_N = sample_files.sampled(len(side.images), limits[name], cfg.seed)
        images = tuple(side.images[place] for place in chosen_N.tolist())
        below = image_folder(folder, files[name])
        check_images(below, images, cfg.data)
        sets[name] = Coco(
            below, folder.name, images, side.classes, cfg.data, annotations, side.digest
        )
    return sets


def annotation_file(folder: Path, split: str) -> Path:
    """The one annotation file of a split; ValueError for none or several."""
    prefix = f"{PREFIX}{split}"
    names = sorted(
        name
        for name in sample_files.listed(folder / ANNOTATIONS)
        if name.startswith(prefix) and name.endswith(".json")
    )
    if len(names) != 1:
        several = f"several, {', '.join(map(printable, names))}" if names else "none"
        raise ValueError(
            f"{str(folder / ANNOTATIONS)!r} should have one file {prefix}*.json as COCO has, and"
            f" has {several}; keep the one that is meant"
        )
    return folder / ANNOTATIONS / names[0]


def image_folder(folder: Path, file: Path) -> Path:
    """The folder of the images that an annotation file describes; ValueError if there is none."""
    found = folder / file.stem.removeprefix(PREFIX)
    if not found.is_dir():
        raise ValueError(f"{str(file)!r} describes images of {str(found)!r}, which is no folder")
    return found


def annotations_of(train: Described, val: Described) -> frozenset[Annotation]:
    """Boxes, and masks if all instances of both sets have them."""
    if train.masks and val.masks:
        return frozenset({"boxes", "masks"})
    if train.masks or val.masks:
        console.say("not all instances have a segmentation: boxes alone are detected")
    return frozenset({"boxes"})


def check_images(folder: Path, images: tuple[Image, ...], limits: Data) -> None:
    """ValueError if images are missing, or if a header that is looked at has another size."""
    names = [image.name for image in images]
    if lost := sample_files.missing(folder, names):
        raise ValueError(
            f"{len(lost)} of {len(names)} images are missing below {str(folder)!r}, first"
            f" {printable(lost[0])!r}; copy them, or remove them from the annotations"
        )
    for place in np.unique(np.linspace(0, len(images) - 1, CHECKED).astype(int)).tolist():
        file = folder / images[place].name
        try:
            width, height = sample_files.measure(file, limits)
        except UnreadableImage:
            continue  # it is left out, and named, when it is read
        check_size(images[place], width, height, file)


def check_size(image: Image, width: int, height: int, file: Path) -> None:
    """UnreadableImage, a ValueError, if an image has another size than its annotation."""
    if (width, height) != (image.width, image.height):
        raise UnreadableImage(
            f"{printable(file)} has {width} x {height} pixels upright, but {image.width} x"
            f" {image.height} in the annotations; correct them"
        )
