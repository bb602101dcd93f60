"""Photo-like pictures for tests, smooth colour under fine noise, and files made of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def photo(width: int = 150, height: int = 110, seed: int = 0) -> Image.Image:
    """Blotches of 20 pixels in strong colours under a little noise."""
    rng = np.random.default_rng(seed)
    coarse = (rng.random((height // 20 + 2, width // 20 + 2, 3)) * 255).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> NDArray[np.uint8]:
    """The bytes of a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 92} if kind in ("JPEG", "WEBP") else {}) | options)
    return np.frombuffer(file.getvalue(), dtype=np.uint8).copy()


def orientation(value: int) -> bytes:
    """An EXIF block with that orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def folder(root: Path, count: int, *, classes: int = 2) -> Path:
    """`count` JPEG photos in class folders; file `i` is picture(i)."""
    for i in range(count):
        path = root / f"class_{i % classes}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(90 + i % 7, 70 + i % 5, seed=i)).tobytes())
    return root
