"""Augmentations for tests: every operation alone and all together, drawn for encoded images."""

from __future__ import annotations

import numpy as np

from unic_ds.config import Data
from unic_ds.data import augmentation
from unic_ds.data.reader import measure

SIZES = (112, 98, 224)  # the quickstart's: student, DINO, EfficientNet
NOTHING = {"jitter": 0, "flip": 0, "grey": 0, "blur": 0, "solarise": 0}
OPERATIONS = {
    "crop": {},
    "flip": {"flip": 1},
    "brightness": {"jitter": 1, "contrast": 0, "saturation": 0, "hue": 0},
    "contrast": {"jitter": 1, "brightness": 0, "saturation": 0, "hue": 0},
    "saturation": {"jitter": 1, "brightness": 0, "contrast": 0, "hue": 0},
    "hue": {"jitter": 1, "brightness": 0, "contrast": 0, "saturation": 0},
    "grey": {"grey": 1},
    "blur": {"blur": 1},
    "solarise": {"solarise": 1},
}
CASES = {name: Data(**NOTHING | changed) for name, changed in OPERATIONS.items()}
CASES |= {"unic": Data(), "weak": Data(augment="weak"), "none": Data(augment="none")}


def drawn(encoded, cfg, seed=0):
    width_B, height_B = zip(*[measure(e, 50) for e in encoded], strict=True)
    count = len(encoded)
    return augmentation.draw(
        seed, np.arange(count), np.zeros(count, dtype=int), width_B, height_B, cfg
    )
