"""Pictures of a run folder inside a page, small enough for it."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unic_ds.files import read_limited, run_files
from unic_ds.files.documents import read_json

FILE_BYTES, PIXELS = 32 << 20, 40_000_000
"""Bytes and pixels of the largest picture that is read."""

PAGE_BYTES = 1_800_000
"""Bytes of all pictures of a page, before base64 makes a third more of them."""

SIZES = ((1600, 82), (1200, 75), (900, 65), (600, 50))
"""Longest side in pixels and quality of WebP: the first that fits is taken."""

FIRST = ("pca", "neighbours")
"""Kinds of pictures that a page shows before others."""

MOST = 40
"""Pictures of a page."""

HOW = (
    "There are none. With --probe.pictures a run draws PCA maps and nearest neighbours of fixed"
    " images, at each probe (--probe.every) and at its end."
)


@dataclass(frozen=True)
class Picture:
    """A picture with its data."""

    run: str
    title: str
    caption: str
    kind: str
    uri: str
    width: int
    height: int


def newest(folder: Path) -> list[Mapping[str, object]]:
    """The newest picture of each kind and model that a run lists; ValueError for another list."""
    file = folder / run_files.PICTURES / run_files.PICTURE_LIST
    if not file.is_file():
        return []
    try:
        rows = read_json(file)
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(file)!r} is no list of pictures; remove it to go without them")
    found = {(str(row.get("kind")), str(row.get("model"))): row for row in rows}
    return [found[key] for key in sorted(found, key=lambda key: key[0] not in FIRST)]


def embedded(folders: Sequence[Path], labels: Sequence[str]) -> tuple[list[Picture], list[str]]:
    """(the newest pictures of the runs, sentences about those that are left out)."""
    wanted: list[tuple[str, Path, Mapping[str, object]]] = []
    problems = []
    for folder, label in zip(folders, labels, strict=True):
        try:
            wanted += [(label, folder, row) for row in newest(folder)]
        except ValueError as error:
            problems.append(str(error))
    if len(wanted) > MOST:
        problems.append(f"{len(wanted) - MOST} of {len(wanted)} pictures are left out: too many")
        wanted = wanted[:MOST]
    found = []
    for label, folder, row in wanted:
        try:
            found.append(picture(label, folder, row, budget=PAGE_BYTES // len(wanted)))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            problems.append(f"the picture {row.get('file')} is left out: {why}")
    return found, problems


def picture(label: str, folder: Path, row: Mapping[str, object], *, budget: int) -> Picture:
    """A picture as WebP of at most `budget` bytes; OSError or ValueError if it cannot be read."""
    name = str(row.get("file"))
    if name != Path(name).name or name.startswith("."):
        raise ValueError("its name is no plain file name")
    image = decoded(read_limited(folder / run_files.PICTURES / name, FILE_BYTES))
    title = str(row.get("title") or row.get("kind") or name)
    kind = str(row.get("kind") or "picture")
    caption = str(row.get("caption") or title)
    return shown(image, run=label, title=title, caption=caption, kind=kind, budget=budget)


def shown(
    image: Image.Image, *, run: str, title: str, kind: str, budget: int, caption: str = ""
) -> Picture:
    """An image as WebP of at most `budget` bytes; ValueError if it does not fit."""
    small, webp = compressed(image, budget)
    return Picture(
        run=run,
        title=title,
        caption=caption or title,
        kind=kind,
        uri=f"data:image/webp;base64,{base64.b64encode(webp).decode()}",
        width=small.width,
        height=small.height,
    )


def decoded(data: bytes) -> Image.Image:
    """The RGB image of a file's bytes; ValueError if it is none, or larger than `PIXELS`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        image = file.convert("RGB") if file.width * file.height <= PIXELS else None
    except Exception:  # on hostile bytes PIL raises SyntaxError, OSError, KeyError, ...
        raise ValueError("it cannot be read as an image") from None
    if image is None:
        raise ValueError(f"it has more than {PIXELS:,} pixels")
    return image


def compressed(image: Image.Image, budget: int) -> tuple[Image.Image, bytes]:
    """(image, WebP) of the largest of `SIZES` that fits; ValueError if none does."""
    for side, quality in SIZES:
        small = image.copy()
        small.thumbnail((side, side))
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=quality)
        if stream.tell() <= budget:
            return small, stream.getvalue()
    raise ValueError(f"it cannot be made smaller than {budget:,} bytes")
