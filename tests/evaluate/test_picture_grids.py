"""Grids of images: every image in its place, and files that are small enough."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unic_ds.evaluate import picture_grids
from unic_ds.evaluate.picture_grids import FRAMES, Cell, Grid, Row


def plain(*colour: int) -> NDArray[np.uint8]:
    return np.full((4, 4, 3), colour, dtype=np.uint8)


def area(image: NDArray[np.uint8], *colour: int) -> tuple[int, int, int]:
    """Number of pixels of a colour, and their first row and column."""
    row_M, column_M = np.nonzero((image == colour).all(-1))
    return len(row_M), int(row_M.min(initial=9999)), int(column_M.min(initial=9999))


def test_every_cell_has_its_place_and_frame() -> None:
    red, green, blue = plain(255, 0, 0), plain(0, 255, 0), plain(0, 0, 255)
    rows = [Row(["a", "b"], [Cell(red), Cell(green)]), Row(["c"], [None, Cell(blue, "x", "same")])]
    grid = Grid("title", "a caption", [rows], side=20)
    image = grid.draw()
    found = [area(image, *colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    assert [count for count, _, _ in found] == [400, 400, 400]
    (_, top, left), (_, *beside), (_, *below) = found
    width, height = grid.cell_2
    assert beside == [top, left + width] and below == [top + height, left + width]
    frame = tuple(bytes.fromhex(FRAMES["same"][1:]))
    assert area(image, *frame) == (26 * 26 - 400, below[0] - 3, below[1] - 3)


def test_a_map_of_tokens_is_drawn_as_squares() -> None:
    four = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], dtype=np.uint8)
    image = Grid("", "", [[Row([], [Cell(four)])]], side=14).draw()
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)):
        assert area(image, *colour)[0] == 49


def test_long_and_hostile_texts_stay_in_the_picture() -> None:
    odd = "w" * 500 + "\x1b[2J\n\udc80"
    cells: list[Cell | None] = [Cell(plain(255, 0, 0), odd)]
    short = Grid("t", "c", [[Row(["l"], cells[:1])]], side=40).draw()
    image = Grid(odd, odd, [[Row([odd], cells)]], side=40).draw()
    assert image.shape[1] == short.shape[1]
    assert area(image, 255, 0, 0)[0] == 1600
    *lines, last = picture_grids.wrapped("one two three four", picture_grids.font(12), 60)
    assert " ".join([*lines, last]) == "one two three four" and lines


def test_a_png_is_small_enough() -> None:
    g = np.random.default_rng(0)
    noise = g.integers(0, 256, (700, 700, 3), dtype=np.uint8)
    data = picture_grids.to_png(noise)
    assert len(data) <= picture_grids.MOST_BYTES
    with Image.open(io.BytesIO(data)) as image:
        assert image.size[0] >= 350 and image.format == "PNG"
    smooth = np.tile(plain(3, 4, 5), (30, 30, 1))
    with Image.open(io.BytesIO(picture_grids.to_png(smooth))) as image:
        assert (np.asarray(image) == smooth).all()
