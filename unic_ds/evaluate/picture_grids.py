"""Grids of images with a title, labels and a caption, drawn as one RGB image."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unic_ds.files.printable import printable

Pixels = NDArray[np.uint8]
"""RGB image (H, W, 3)."""

MARGIN, GAP, BORDER = 12, 4, 3
INK, GREY, PAPER = "#1a1a1a", "#5a5a5a", "#ffffff"
Frame = Literal["", "same", "other"]
FRAMES: dict[Frame, str] = {"": PAPER, "same": "#0072b2", "other": "#e69f00"}
"""Colours that those who see no red or green tell apart."""
MOST_BYTES = 400_000
"""Bytes of the largest PNG."""


@dataclass(frozen=True)
class Cell:
    """An image of a grid, with a line of text below it and a coloured frame."""

    image: Pixels
    note: str = ""
    frame: Frame = ""


@dataclass(frozen=True)
class Row:
    """A row of a grid: the lines of its label, and its cells (None: an empty place)."""

    label: Sequence[str]
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Grid:
    """Blocks of rows side by side and below each other, under a title and above a caption."""

    title: str
    caption: str
    blocks: Sequence[Sequence[Row]]
    side: int
    """Pixels of a cell's image."""
    columns: int = 1
    """Blocks beside each other."""
    label_width: int = 112

    @property
    def note_height(self) -> int:
        """Pixels below a cell for its text."""
        rows = (row for block in self.blocks for row in block)
        return 15 if any(cell and cell.note for row in rows for cell in row.cells) else 0

    @property
    def cell_2(self) -> tuple[int, int]:
        """Width and height that a cell takes."""
        outer = self.side + 2 * BORDER + GAP
        return outer, outer + self.note_height

    @property
    def block_2(self) -> tuple[int, int]:
        """Width and height that the largest block takes."""
        width, height = self.cell_2
        cells = max(len(row.cells) for block in self.blocks for row in block)
        rows = max(map(len, self.blocks))
        return self.label_width + cells * width, rows * height

    def draw(self) -> Pixels:
        """The grid as an RGB image."""
        width, height = self.block_2
        down = -(-len(self.blocks) // self.columns)
        whole = 2 * MARGIN + self.columns * width + (self.columns - 1) * 2 * MARGIN
        caption = list(wrapped(printable(self.caption, 2000), font(12), whole - 2 * MARGIN))
        top = MARGIN + 26
        bottom = top + down * (height + MARGIN)
        canvas = Image.new("RGB", (whole, bottom + 16 * len(caption) + MARGIN), PAPER)
        draw = ImageDraw.Draw(canvas)
        draw.text((MARGIN, MARGIN - 2), printable(self.title), INK, font(16))
        for place, block in enumerate(self.blocks):
            left = MARGIN + place % self.columns * (width + 2 * MARGIN)
            self.draw_block(
                canvas, block, left=left, top=top + place // self.columns * (height + MARGIN)
            )
        for line, text in enumerate(caption):
            draw.text((MARGIN, bottom + 16 * line), text, GREY, font(12))
        return np.asarray(canvas)

    def draw_block(self, canvas: Image.Image, block: Sequence[Row], *, left: int, top: int) -> None:
        """Draw the rows of a block, whose upper left corner is given."""
        draw, (width, height) = ImageDraw.Draw(canvas), self.cell_2
        for number, row in enumerate(block):
            at = top + number * height
            for line, text in enumerate(row.label):
                ink, size = (INK, 13) if line == 0 else (GREY, 11)
                shown = shortened(printable(text), font(size), self.label_width - 8)
                draw.text((left, at + BORDER + 16 * line), shown, ink, font(size))
            for column, cell in enumerate(row.cells):
                if cell:
                    x = left + self.label_width + column * width
                    self.draw_cell(canvas, cell, left=x, top=at)

    def draw_cell(self, canvas: Image.Image, cell: Cell, *, left: int, top: int) -> None:
        """Draw an image in its frame, and its note."""
        draw, outer = ImageDraw.Draw(canvas), self.side + 2 * BORDER
        draw.rectangle((left, top, left + outer - 1, top + outer - 1), FRAMES[cell.frame])
        canvas.paste(resized(cell.image, self.side), (left + BORDER, top + BORDER))
        if cell.note:
            shown = shortened(printable(cell.note), font(11), outer)
            draw.text((left + BORDER, top + outer), shown, GREY, font(11))


def resized(image: Pixels, side: int) -> Image.Image:
    """A square image of `side` pixels; a small one becomes squares, as a map of tokens should."""
    found = Image.fromarray(image)
    larger = side >= image.shape[0]
    method = Image.Resampling.NEAREST if larger else Image.Resampling.BICUBIC
    return found.resize((side, side), method)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings."""
    return ImageFont.load_default(size)


def wrapped(
    text: str, letters: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> Iterator[str]:
    """Lines of a text that are at most `width` pixels wide; a longer word has a line of its own."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".lstrip()
        if line and letters.getlength(longer) > width:
            yield line
            longer = word
        line = longer
    if line:
        yield line


def shortened(text: str, letters: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut with an ellipsis so that it is at most `width` pixels wide."""
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def to_png(image: Pixels) -> bytes:
    """The bytes of a PNG of at most `MOST_BYTES`, in 256 colours or smaller if need be."""
    found = Image.fromarray(image)
    data = png_bytes(found)
    while len(data) > MOST_BYTES:
        data = png_bytes(found.quantize(256, method=Image.Quantize.MEDIANCUT))
        found = found.reduce(2)
    return data


def png_bytes(image: Image.Image) -> bytes:
    """The bytes of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
