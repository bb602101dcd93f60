"""Where the images are, how they are augmented and decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unic_ds.config.option import check, check_most, option


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images are, how they are augmented and decoded."""

    train: str = option(
        "",
        "images: a folder (class folders optional), a folder of .tar shards, a .txt list of paths,"
        " or several: a,b=0.5 shows half of b in an epoch",
        machinery=True,
    )
    val: str = option(
        "", "images to evaluate on, named likewise; empty: val_share of train", machinery=True
    )
    window: int = option(8, "shards whose samples are shuffled together", most=1_000_000)
    val_share: float = option(0.0, "share of train held out, by a seeded hash of the sample's name")
    augment: Literal["unic", "weak", "none"] = option(
        "unic", "draws: unic (all), weak (crop + flip), none (centre)"
    )
    crop_min: float = option(0.08, "smallest crop, as a share of the image's area")
    ratio_max: float = option(
        4 / 3, "a crop's largest aspect ratio; the smallest is its inverse", most=1_000.0
    )
    flip: float = option(0.5, "chance of a horizontal flip")
    jitter: float = option(0.8, "chance of colour jitter")
    brightness: float = option(0.4, "jitter: factor in 1 -/+ this")
    contrast: float = option(0.4, "jitter: factor in 1 -/+ this")
    saturation: float = option(0.2, "jitter: factor in 1 -/+ this")
    hue: float = option(0.1, "jitter: turn of the colour circle in -/+ this")
    grey: float = option(0.2, "chance of turning grey")
    blur: float = option(0.2, "chance of Gaussian blur")
    blur_min: float = option(0.1, "smallest blur sigma, in student pixels")
    blur_max: float = option(5.0, "largest blur sigma, in student pixels", most=1_000.0)
    solarise: float = option(0.2, "chance of inverting what is brighter than half")
    backend: Literal["auto", "dali", "torch"] = option(
        "auto", "decoder: DALI, its torch twin, or what is there", machinery=True
    )
    threads: int = option(
        0, "decoding threads per rank; 0: the rank's share of the cores", machinery=True, most=4_096
    )
    readers: int = option(
        16,
        "files read at once per rank, images and stored features alike",
        machinery=True,
        most=1_024,
    )
    prefetch: int = option(2, "batches decoded ahead", machinery=True, most=1_024)
    bad_limit: float = option(
        0.01, "stop when more than this share of the images cannot be read", machinery=True
    )
    max_mb: float = option(
        256.0,
        "a file of more bytes counts as unreadable, and is not read",
        machinery=True,
        most=100_000.0,
    )
    max_megapixels: float = option(
        50.0, "a larger image counts as unreadable (decompression bombs)", most=100_000.0
    )

    def __post_init__(self) -> None:
        check_most(self, "data.")
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
