"""Random augmentation parameters of samples: a pure function of (seed, epoch, sample).

Crop windows follow torchvision's RandomResizedCrop, colour factors its ColorJitter (UNIC, section
4). Colour has one order: brightness, contrast about the image's mean grey, saturation, hue as a
rotation in YIQ, without clamping in between. All four are linear, so together they are one affine
map; grey is a saturation of 0. torchvision shuffles the four, clamps after each and rotates hue in
HSV.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unic_ds import rng
from unic_ds.config import Data

ATTEMPTS = 10  # of RandomResizedCrop before it falls back to the central crop
BLOCKS = 8  # of four random words each, used in `draw`
BLUR_RADIUS = 4  # pixels at the reference side, the student's: the kernel of 9 taps of UNIC
_YIQ_33 = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB_33 = np.linalg.inv(_YIQ_33)


class Draws(NamedTuple):
    """Augmentation parameters of B images; comments give the values without effect."""

    window_B4: NDArray[np.int32]  # x, y, width, height in pixels of the upright image
    flip_B: NDArray[np.bool_]
    brightness_B: NDArray[np.float32]  # factor; 1: no change
    contrast_B: NDArray[np.float32]  # factor; 1: no change
    saturation_B: NDArray[np.float32]  # factor; 1: no change, 0: grey
    hue_B: NDArray[np.float32]  # fraction of the colour circle; 0: no change
    sigma_B: NDArray[np.float32]  # blur in pixels at the reference side; 0: no blur
    solarise_B: NDArray[np.bool_]

    @property
    def coloured_B(self) -> NDArray[np.bool_]:
        """True for images whose colours change."""
        factors = (self.brightness_B, self.contrast_B, self.saturation_B)
        return np.any([factor_B != 1 for factor_B in factors] + [self.hue_B != 0], axis=0)

    def one(self, b: int) -> Draws:
        """The parameters of image `b` as a batch of one."""
        return Draws._make(field[b : b + 1] for field in self)

    def put(self, b: int, other: Draws) -> Draws:
        """A copy with the parameters of image `b` replaced by those of the one image in `other`."""
        pairs = zip(self, other, strict=True)
        return Draws._make(np.concatenate([old[:b], new, old[b + 1 :]]) for old, new in pairs)


def draw(
    seed: int,
    index_B: ArrayLike,
    epoch_B: ArrayLike,
    width_B: ArrayLike,
    height_B: ArrayLike,
    cfg: Data,
) -> Draws:
    """Draw the parameters of samples in epochs; sides in pixels are of the upright images."""
    width, height = np.asarray(width_B, dtype=np.float64), np.asarray(height_B, dtype=np.float64)
    if cfg.augment == "none":
        return _plain(_centre(width, height), np.zeros(len(width), dtype=bool))
    index_B1, epoch_B1 = np.asarray(index_B)[:, None], np.asarray(epoch_B)[:, None]
    u = (
        rng.uniform(seed, "draw", 4, index_B1, epoch_B1, np.arange(BLOCKS))
        .reshape(len(width), -1)
        .T
    )
    window_B4 = _window(u[:20], u[20], u[21], width, height, cfg)
    if cfg.augment == "weak":
        return _plain(window_B4, u[22] < cfg.flip)
    jitter_B = u[23] < cfg.jitter
    grey_B = u[28] < cfg.grey
    hue_B = np.where(jitter_B & ~grey_B, cfg.hue * (2 * u[27] - 1), 0)
    sigma_B = np.where(u[29] < cfg.blur, cfg.blur_min + (cfg.blur_max - cfg.blur_min) * u[30], 0)
    return Draws(
        window_B4,
        u[22] < cfg.flip,
        _factor(u[24], cfg.brightness, jitter_B),
        _factor(u[25], cfg.contrast, jitter_B),
        np.where(grey_B, 0, _factor(u[26], cfg.saturation, jitter_B)).astype(np.float32),
        hue_B.astype(np.float32),
        sigma_B.astype(np.float32),
        u[31] < cfg.solarise,
    )


def colour(draws: Draws) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(pixel_B33, mean_B33): rgb becomes `pixel @ rgb + mean @ mean_rgb_of_image`, clamped."""
    angle_B = -2 * np.pi * draws.hue_B.astype(np.float64)  # from red to yellow, as in HSV
    saturation_B = draws.saturation_B.astype(np.float64)
    cos_B, sin_B = saturation_B * np.cos(angle_B), saturation_B * np.sin(angle_B)
    yiq_B33 = np.zeros((len(angle_B), 3, 3))
    yiq_B33[:, 0, 0] = 1
    yiq_B33[:, 1, 1], yiq_B33[:, 1, 2] = cos_B, -sin_B
    yiq_B33[:, 2, 1], yiq_B33[:, 2, 2] = sin_B, cos_B
    brightness_B, contrast_B = draws.brightness_B.astype(np.float64), draws.contrast_B
    gain_B, lift_B = brightness_B * contrast_B, brightness_B * (1 - contrast_B)
    pixel_B33 = gain_B[:, None, None] * (_RGB_33 @ yiq_B33 @ _YIQ_33)
    # The mean is grey, which neither saturation nor hue changes.
    mean_B33 = lift_B[:, None, None] * np.broadcast_to(_YIQ_33[0], (3, 3))
    return pixel_B33.astype(np.float32), mean_B33.astype(np.float32)


def blur_radius(side: int, reference: int) -> int:
    """Radius of the blur kernel in pixels at `side`, scaled like sigma from side `reference`."""
    return max(1, round(BLUR_RADIUS * side / reference))


def _plain(window_B4: NDArray[np.int32], flip_B: NDArray[np.bool_]) -> Draws:
    """Parameters of a crop and a flip alone."""
    one_B, zero_B = np.ones(len(flip_B), dtype=np.float32), np.zeros(len(flip_B), dtype=np.float32)
    return Draws(window_B4, flip_B, one_B, one_B, one_B, zero_B, zero_B, zero_B > 0)


def _factor(
    u_B: NDArray[np.float64], reach: float, drawn_B: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Uniform in 1 -/+ reach for images that are drawn, 1 for others."""
    return np.where(drawn_B, 1 + reach * (2 * u_B - 1), 1).astype(np.float32)


def _centre(width_B: NDArray[np.float64], height_B: NDArray[np.float64]) -> NDArray[np.int32]:
    """The largest central square of each image."""
    side_B = np.minimum(width_B, height_B)
    corner = [(width_B - side_B) // 2, (height_B - side_B) // 2]
    return np.stack([*corner, side_B, side_B], -1).astype(np.int32)


def _window(
    u_AB: NDArray[np.float64],
    x_B: NDArray[np.float64],
    y_B: NDArray[np.float64],
    width_B: NDArray[np.float64],
    height_B: NDArray[np.float64],
    cfg: Data,
) -> NDArray[np.int32]:
    """RandomResizedCrop: the first of ten (area, ratio) that fits, else a clipped central crop."""
    area_AB = width_B * height_B * (cfg.crop_min + (1 - cfg.crop_min) * u_AB[:ATTEMPTS])
    ratio_AB = np.exp(np.log(cfg.ratio_max) * (2 * u_AB[ATTEMPTS:] - 1))
    w_AB, h_AB = np.rint(np.sqrt(area_AB * ratio_AB)), np.rint(np.sqrt(area_AB / ratio_AB))
    fits_AB = (w_AB > 0) & (w_AB <= width_B) & (h_AB > 0) & (h_AB <= height_B)
    found_B, first_1B = fits_AB.any(0), fits_AB.argmax(0)[None]
    w_B = np.minimum(width_B, np.rint(height_B * cfg.ratio_max))
    h_B = np.minimum(height_B, np.rint(width_B * cfg.ratio_max))
    w_B = np.where(found_B, np.take_along_axis(w_AB, first_1B, 0)[0], w_B)
    h_B = np.where(found_B, np.take_along_axis(h_AB, first_1B, 0)[0], h_B)
    left_B = np.where(found_B, np.floor(x_B * (width_B - w_B + 1)), (width_B - w_B) // 2)
    top_B = np.where(found_B, np.floor(y_B * (height_B - h_B + 1)), (height_B - h_B) // 2)
    return np.stack([left_B, top_B, w_B, h_B], -1).astype(np.int32)
