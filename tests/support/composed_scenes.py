"""Stamps pasted on backgrounds, with exact masks, distances and corresponding points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from stamps import SOLID, Random, Split, Stamp, background, of_split, pick, random

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Size:
    """Sides and numbers of composed images."""

    side: int = 160
    train: int = 60
    val: int = 20
    noise: bool = False
    """True: backgrounds of noise, also if others are installed (which take seconds to load)."""

    def count(self, split: Split) -> int:
        """Number of images of a split."""
        return self.train if split == "train" else self.val


SMALL = Size(side=96, train=18, val=6, noise=True)
"""For tests."""


class Placed(NamedTuple):
    """An object of a scene."""

    stamp: Stamp
    mask_HW: Mask
    """Its visible solid pixels."""
    crowd: bool = False
    """True if these are several copies of it."""


class Scene(NamedTuple):
    """An image [H, W, 3] of known objects."""

    image_HW3: Picture
    placed: tuple[Placed, ...]
    edge_HW: Mask
    """Pixels in which an object and what is behind it are mixed."""


def scene(split: Split, number: int, size: Size) -> Scene:
    """A scene of one to four objects, half visible at least; each tenth has a crowd before them."""
    draw, side = random("scene", split, number), size.side
    image = background(side, side, draw, noise=size.noise).copy()
    shown: list[Placed] = []
    solid_area: list[int] = []
    edge_HW = np.zeros((side, side), bool)
    for place in range(draw.integers(2, 5)):
        crowd = place == 1 and number % 10 == 1
        stamp = pick(of_split(split), draw)
        layer = (crowd_layer if crowd else layer_of)(stamp, side, draw)
        alpha_HW = layer[..., 3]
        left = [placed.mask_HW & (alpha_HW < SOLID) for placed in shown]
        if any(2 * m.sum() < area for m, area in zip(left, solid_area, strict=True)):
            continue
        shown = [p._replace(mask_HW=m) for p, m in zip(shown, left, strict=True)]
        shown.append(Placed(stamp, alpha_HW >= SOLID, crowd))
        solid_area.append(int((alpha_HW >= SOLID).sum()))
        edge_HW = (edge_HW & (alpha_HW == 0)) | ((alpha_HW > 12) & (alpha_HW < 243))
        image = blended(image, layer)
    return Scene(image, tuple(shown), edge_HW)


def empty_scene(split: Split, size: Size) -> Scene:
    """A background without objects."""
    draw, side = random("empty", split), size.side
    image = background(side, side, draw, noise=size.noise)
    return Scene(image, (), np.zeros((side, side), bool))


def layer_of(stamp: Stamp, side: int, draw: Random) -> Picture:
    """A square layer [side, side, 4] with the stamp at a random place and size."""
    longer = round(side * draw.uniform(0.3, 0.6))
    picture = stamp.sized(longer, flip=draw.random() < 0.5)
    free = side - np.array(picture.shape[:2])
    return layer_with(picture, side, side, tuple(draw.integers(0, free + 1)))


def crowd_layer(stamp: Stamp, side: int, draw: Random) -> Picture:
    """A layer with four small copies of the stamp in a row, in one quarter of its height."""
    picture = stamp.sized(side // 5)
    layer = np.zeros((side, side, 4), np.uint8)
    top = int(draw.integers(0, side - picture.shape[0] + 1))
    for left in range(0, 4 * (side // 4), side // 4):
        layer = np.maximum(layer, layer_with(picture, side, side, (top, left)))
    return layer


def layer_with(picture: Picture, height: int, width: int, corner: Sequence[int]) -> Picture:
    """A transparent layer with the picture; what lies outside is cut off. `corner`: row, column."""
    layer = Image.new("RGBA", (width, height))
    layer.paste(Image.fromarray(picture), (int(corner[1]), int(corner[0])))
    return np.asarray(layer)


def blended(image: Picture, layer: Picture) -> Picture:
    """The image under the layer."""
    alpha = layer[..., 3:] / 255
    return np.rint(image * (1 - alpha) + layer[..., :3] * alpha).astype(np.uint8)


NEAR, FAR = 1.2, 6.0
"""Distance in metres of the ground at the image's bottom and top."""


class DepthScene(NamedTuple):
    """An image [H, W, 3] and the distance of each pixel."""

    image_HW3: Picture
    depth_HW: NDArray[np.uint16]
    """Millimetres; 0 where object and ground are mixed."""


def depth_scene(split: Split, number: int, size: Size) -> DepthScene:
    """A ground plane with objects that stand on it, smaller the farther they are; 4 : 3."""
    draw, width = random("depth", split, number), size.side
    height = width * 3 // 4
    image = background(height, width, draw, noise=size.noise).copy()
    ground_H = np.linspace(FAR, NEAR, height)
    image = np.rint(image * np.linspace(0.4, 1, height)[:, None, None]).astype(np.uint8)
    depth_HW = np.repeat(np.rint(1000 * ground_H)[:, None], width, 1)
    for metres in sorted(draw.uniform(1.3, 3.5, draw.integers(1, 4)), reverse=True):
        picture = pick(of_split(split), draw).sized(round(0.7 * height / metres))
        foot = int(np.searchsorted(-ground_H, -metres))
        left = draw.integers(0, width - picture.shape[1] + 1)
        layer = layer_with(picture, height, width, (foot - picture.shape[0], left))
        alpha_HW = layer[..., 3]
        depth_HW = np.where(alpha_HW >= 243, round(1000 * metres), depth_HW)
        depth_HW = np.where((alpha_HW > 12) & (alpha_HW < 243), 0, depth_HW)
        image = blended(image, layer)
    return DepthScene(image, depth_HW.astype(np.uint16))


class View(NamedTuple):
    """An image of one stamp under a known similarity transform."""

    image_HW3: Picture
    mask_HW: Mask
    point_K2: NDArray[np.float64]
    """x, y of the keypoints, in pixels from the image's corner: a pixel's centre has .5."""


def views(split: Split, number: int, size: Size) -> tuple[Stamp, View, View]:
    """A stamp seen twice, at other sizes, places and angles, with the same keypoints."""
    draw = random("pair", split, number)
    stamp = pick(of_split(split), draw)
    picture = stamp.sized(size.side // 2)
    solid_K2 = spread_points(picture[..., 3] >= 250, 8, draw)
    first, second = (view(picture, solid_K2, size, draw) for _ in range(2))
    return stamp, first, second


def spread_points(solid_HW: Mask, count: int, draw: Random) -> NDArray[np.float64]:
    """Centres x, y of at most `count` solid pixels that lie far from each other."""
    all_P2 = np.argwhere(solid_HW)[:, ::-1] + 0.5
    chosen = [int(draw.integers(len(all_P2)))]
    for _ in range(min(count, len(all_P2)) - 1):
        gap_PK = np.linalg.norm(all_P2[:, None] - all_P2[None, chosen], axis=-1)
        chosen.append(int(gap_PK.min(1).argmax()))
    return all_P2[chosen]


def view(picture: Picture, point_K2: NDArray[np.float64], size: Size, draw: Random) -> View:
    """The picture scaled by 0.8 to 1.2, turned by 30 degrees at most, wholly in the image."""
    side, scale = size.side, draw.uniform(0.8, 1.2)
    angle = math.radians(draw.uniform(-30, 30))
    turn_22 = scale * np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    height, width = picture.shape[:2]
    corner_42 = np.array([(0, 0), (width, 0), (0, height), (width, height)]) @ turn_22.T
    room_2 = side - np.ptp(corner_42, 0)
    shift_2 = draw.uniform(0, np.maximum(room_2, 0)) - corner_42.min(0)
    back_22 = np.linalg.inv(turn_22)
    inverse = np.column_stack([back_22, -back_22 @ shift_2]).ravel()
    # Weighted by alpha, as transparent pixels have any colour.
    layer = Image.fromarray(picture).convert("RGBa")
    turned = layer.transform(
        (side, side), Image.Transform.AFFINE, tuple(inverse), Image.Resampling.BICUBIC
    )
    layer_HW4 = np.asarray(turned.convert("RGBA"))
    image = blended(background(side, side, draw, noise=size.noise), layer_HW4)
    return View(image, layer_HW4[..., 3] >= SOLID, point_K2 @ turn_22.T + shift_2)
