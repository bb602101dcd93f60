"""Cut-out pictures with a class and an alpha channel, and backgrounds to paste them on.

Pictures come from Debian's tuxpaint-stamps-default (GPL-2: they stay out of the repository), or
are drawn if it is not installed; backgrounds from gnome-backgrounds (CC BY-SA), or smooth noise.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Split = Literal["train", "val"]
Random = np.random.Generator

STAMPS = Path("/usr/share/tuxpaint/stamps")
BACKGROUNDS = Path("/usr/share/backgrounds/gnome")
GROUPS = ("animals", "food", "household", "plants", "town", "vehicles")
"""Folders of stamps that are used: things, rather than letters and signs."""
SHAPES = ("disc", "ring", "box", "star", "cross", "triangle")
LARGEST, SMALLEST = 192, 32
"""Longer side of a stamp in pixels: larger ones are reduced, smaller ones are left out."""
SOLID = 128
"""Least alpha of a pixel that belongs to the object."""
SEED = 11


@dataclass(frozen=True)
class Stamp:
    """A cut-out picture; `image` is RGBA, trimmed to its solid pixels."""

    name: str
    group: str
    fine: str
    """Its group, and the folder below it."""
    image: Image.Image = field(compare=False, repr=False)

    def sized(self, side: int, *, flip: bool = False) -> NDArray[np.uint8]:
        """The picture [h, w, 4] with a longer side of `side` pixels, mirrored if `flip`."""
        image = scaled(self.image, side)
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def scaled(image: Image.Image, side: int) -> Image.Image:
    """The image with a longer side of `side` pixels; colours are weighted by alpha."""
    scale = side / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def random(*key: str | int) -> Random:
    """A generator for a name and numbers: the same stream whenever it is asked for."""
    words = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in key]
    return np.random.default_rng([SEED, *words])


@cache
def stamps() -> tuple[Stamp, ...]:
    """All stamps, in the order of their names; no picture is among them twice."""
    found = installed() if STAMPS.is_dir() else drawn()
    return tuple({hashlib.sha256(s.image.tobytes()).digest(): s for s in found}.values())


def installed() -> list[Stamp]:
    """The package's stamps that have a solid part of at least a twentieth of their area."""
    found = []
    for path in sorted(path for group in GROUPS for path in (STAMPS / group).rglob("*.png")):
        folder = path.relative_to(STAMPS).parts[:-1]
        fine = "_".join(part for part in folder[:2] if part != "cartoon")
        image = trimmed(Image.open(path).convert("RGBA"))
        if image and max(image.size) >= SMALLEST:
            if max(image.size) > LARGEST:
                image = scaled(image, LARGEST)
            name = path.relative_to(STAMPS).with_suffix("").as_posix()
            found.append(Stamp(name, folder[0], fine, image))
    return found


def trimmed(image: Image.Image) -> Image.Image | None:
    """The part of an RGBA image within the box of its solid pixels; None if these are few."""
    solid = image.getchannel("A").point(lambda alpha: 255 * (alpha >= SOLID))
    if np.asarray(solid).mean() < 0.05 * 255:
        return None
    return image.crop(solid.getbbox())


def drawn() -> list[Stamp]:
    """Forty shapes of each kind in colours and sizes of their own, with smooth edges."""
    found = []
    for group in SHAPES:
        for number in range(40):
            draw = random("shape", group, number)
            name = f"{group}/{number:02d}"
            found.append(Stamp(name, group, f"{group}_{number % 2}", shape(group, draw)))
    return found


def shape(kind: str, draw: Random) -> Image.Image:
    """A shape of 96 pixels, drawn at four times that."""
    side = 4 * 96
    image = Image.new("L", (side, side))
    pen, middle, radius = ImageDraw.Draw(image), side / 2, side / 2 - 4
    if kind in ("disc", "ring"):
        pen.ellipse((4, 4, side - 4, side - 4), fill=255)
        if kind == "ring":
            inner = radius * draw.uniform(0.4, 0.7)
            box = (middle - inner, middle - inner, middle + inner, middle + inner)
            pen.ellipse(box, fill=0)
    else:
        inner, corners = {"box": (1, 4), "triangle": (1, 3), "star": (0.45, 10), "cross": (0.3, 8)}[
            kind
        ]
        turn = draw.uniform(0, math.tau)
        pen.polygon(
            [
                (middle + far * math.cos(angle), middle + far * math.sin(angle))
                for i in range(corners)
                for far in [radius * (inner if i % 2 else 1)]
                for angle in [turn + math.tau * i / corners]
            ],
            fill=255,
        )
    alpha = image.resize((96, 96), Image.Resampling.LANCZOS)
    coloured = smooth_noise(96, 96, draw)
    found = trimmed(Image.fromarray(np.dstack([coloured, np.asarray(alpha)])))
    assert found
    return found


@cache
def of_split(split: Split) -> tuple[Stamp, ...]:
    """The stamps of a split: a seeded quarter of each group is for validation."""
    chosen: list[Stamp] = []
    for group in dict.fromkeys(stamp.group for stamp in stamps()):
        members = [stamp for stamp in stamps() if stamp.group == group]
        order = random("split", group).permutation(len(members))
        held = max(1, len(members) // 4)
        part = order[:held] if split == "val" else order[held:]
        chosen += [members[place] for place in sorted(part)]
    return tuple(chosen)


def classes() -> tuple[str, ...]:
    """Names of the groups, in order."""
    return tuple(sorted({stamp.group for stamp in stamps()}))


def fine_classes(least: int = 4) -> tuple[str, ...]:
    """Fine classes with at least `least` training stamps and one of validation."""
    train, val = ([stamp.fine for stamp in of_split(split)] for split in ("train", "val"))
    return tuple(sorted({f for f in val if train.count(f) >= least}))


def pick(members: Sequence[Stamp], draw: Random) -> Stamp:
    """A stamp of a group that is drawn first, so that groups are as frequent as each other."""
    groups = sorted({stamp.group for stamp in members})
    group = groups[draw.integers(len(groups))]
    among = [stamp for stamp in members if stamp.group == group]
    return among[draw.integers(len(among))]


@cache
def backgrounds() -> tuple[Image.Image, ...]:
    """The installed backgrounds at 1,024 pixels; none if there are none."""
    paths = sorted(BACKGROUNDS.glob("*-l.webp"))
    images = (Image.open(path).convert("RGB") for path in paths)
    return tuple(image.resize((1024, 1024), Image.Resampling.BOX) for image in images)


def background(height: int, width: int, draw: Random, *, noise: bool) -> NDArray[np.uint8]:
    """A random part [height, width, 3] of an installed background, or noise."""
    if noise or not backgrounds():
        return smooth_noise(height, width, draw)
    image = backgrounds()[draw.integers(len(backgrounds()))]
    scale = draw.uniform(1, 1024 / max(height, width))
    w, h = int(width * scale), int(height * scale)
    x, y = draw.integers(1024 - w + 1), draw.integers(1024 - h + 1)
    part = image.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + w, y + h))
    return np.asarray(part)


def smooth_noise(height: int, width: int, draw: Random) -> NDArray[np.uint8]:
    """Blotches of 24 pixels under a little noise: [height, width, 3]."""
    coarse = draw.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
    blotches = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(blotches) + draw.normal(0, 4, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)
