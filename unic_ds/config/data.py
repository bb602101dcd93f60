"""Options of the images: where they are, how they are augmented and decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unic_ds.config.option import MOST_PIXELS, check, check_most, option

IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images, augmentation and decoding."""

    train: str = option(
        "",
        "training images: a folder (class folders optional), a folder of .tar shards, a .txt list"
        " of paths, or a mixture: a,b=0.5 uses half of b in each epoch",
        machinery=True,
    )
    val: str = option(
        "",
        "validation images, in the same forms; empty: data.val_share of the training images",
        machinery=True,
    )
    sizes: tuple[int, ...] = option(
        (),
        "multi-resolution training: sides in pixels of the student's images, of which each step"
        " draws one; empty: student.size in all steps",
    )
    size_draw: Literal["shared", "independent"] = option(
        "shared",
        "multi-resolution: shared: the teachers' images have the patch grid that the step draws for"
        " the student; independent: each teacher draws its own, and its map is resized",
    )
    tokens: int = option(
        0,
        "multi-resolution: patch tokens of the student in a micro batch, at most; 0: those of the"
        " ds_config's micro batch at student.size",
        machinery=True,
    )
    window: int = option(8, "number of shards whose samples are shuffled together", most=1_000_000)
    val_share: float = option(
        0.0,
        "fraction of the training images held out for validation, by a seeded hash of their names",
    )
    augment: Literal["unic", "weak", "none"] = option(
        "unic",
        "augmentation: unic: crop, flip, colour jitter, grey, blur, solarise; weak: crop and flip;"
        " none: centre crop",
    )
    crop_min: float = option(
        0.08, "smallest random resized crop, as a fraction of the image's area"
    )
    ratio_max: float = option(
        4 / 3, "largest aspect ratio of a crop; the smallest is its inverse", most=1_000.0
    )
    flip: float = option(0.5, "probability of a horizontal flip")
    jitter: float = option(0.8, "probability of colour jitter")
    brightness: float = option(0.4, "colour jitter: brightness factor in 1 -/+ this")
    contrast: float = option(0.4, "colour jitter: contrast factor in 1 -/+ this")
    saturation: float = option(0.2, "colour jitter: saturation factor in 1 -/+ this")
    hue: float = option(
        0.1, "colour jitter: hue shift in -/+ this, as a fraction of the colour circle"
    )
    grey: float = option(0.2, "probability of conversion to grey")
    blur: float = option(0.2, "probability of Gaussian blur")
    blur_min: float = option(0.1, "smallest sigma of the blur, in pixels of the student's image")
    blur_max: float = option(
        5.0, "largest sigma of the blur, in pixels of the student's image", most=1_000.0
    )
    solarise: float = option(
        0.2, "probability of solarisation: pixels brighter than half are inverted"
    )
    backend: Literal["auto", "dali", "torch"] = option(
        "auto",
        "image decoder: DALI; torch: the same on the CPU without DALI; auto: DALI if it is"
        " installed",
        machinery=True,
    )
    threads: int = option(
        0,
        "decoding threads per rank; 0: the node's CPU cores divided by its ranks",
        machinery=True,
        most=4_096,
    )
    readers: int = option(
        16,
        "files that a rank reads concurrently, of images and of a feature cache",
        machinery=True,
        most=1_024,
    )
    prefetch: int = option(2, "batches to decode ahead", machinery=True, most=1_024)
    bad_limit: float = option(
        0.01, "abort if more than this fraction of the images cannot be read", machinery=True
    )
    max_mb: float = option(
        256.0,
        "largest image file in MB; a larger one is not read and counts as unreadable",
        machinery=True,
        most=100_000.0,
    )
    max_megapixels: float = option(
        50.0,
        "largest image in megapixels; a larger one counts as unreadable (decompression bombs)",
        most=100_000.0,
    )

    def __post_init__(self) -> None:
        check_most(self, "data.")
        none = "if data.sizes is empty (in --stages beside 'data.sizes=')"
        pixels = all(0 < size <= MOST_PIXELS for size in self.sizes)
        check(pixels, "data.sizes", f"from 1 to {MOST_PIXELS}", self.sizes)
        check(len(set(self.sizes)) == len(self.sizes), "data.sizes", "distinct", self.sizes)
        check(len(self.sizes) != 1, "data.sizes", "two or more (or empty)", self.sizes)
        check(self.tokens >= 0, "data.tokens", ">= 0", self.tokens)
        check(
            bool(self.sizes) or not self.tokens,
            "data.tokens",
            f"0 {none}",
            self.tokens,
        )
        alike = bool(self.sizes) or self.size_draw == "shared"
        check(alike, "data.size_draw", f"shared {none}", self.size_draw)
        for key in ("flip", "jitter", "grey", "blur", "solarise", "bad_limit"):
            value = getattr(self, key)
            check(0 <= value <= 1, f"data.{key}", "in [0, 1]", value)
        check(0 <= self.val_share < 1, "data.val_share", "in [0, 1)", self.val_share)
        check(self.window > 0, "data.window", "positive", self.window)
        check(0 < self.crop_min <= 1, "data.crop_min", "in (0, 1]", self.crop_min)
        check(self.ratio_max >= 1, "data.ratio_max", ">= 1", self.ratio_max)
        for key in ("brightness", "contrast", "saturation"):
            value = getattr(self, key)
            check(0 <= value <= 1, f"data.{key}", "in [0, 1]", value)
        check(0 <= self.hue <= 0.5, "data.hue", "in [0, 0.5]", self.hue)
        check(
            0 < self.blur_min <= self.blur_max, "data.blur_min", "in (0, blur_max]", self.blur_min
        )
        check(self.threads >= 0, "data.threads", ">= 0", self.threads)
        check(self.readers >= 1, "data.readers", ">= 1", self.readers)
        check(self.prefetch >= 1, "data.prefetch", ">= 1", self.prefetch)
        check(self.max_mb > 0, "data.max_mb", "positive", self.max_mb)
        check(self.max_megapixels > 0, "data.max_megapixels", "positive", self.max_megapixels)
