"""Positions of the hidden units of every (rung, teacher) in the ladder's buffers.

A rung's first Linears are stacked, teacher after teacher: rows of `w1[l]`. A teacher's hidden units
of all rungs stand side by side: columns of its [M, K_t] matrix, so that its second Linears are one
GEMM. These matrices follow one another in one flat buffer of M * sum(K_t) elements, M = B N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """The hidden units of one teacher on one rung."""

    teacher: int
    row0: int  # first row in the rung's stacked weight
    column: int  # first column in the teacher's matrix
    width: int

    @property
    def rows(self) -> slice:
        """Its rows in the rung's stacked weight."""
        return slice(self.row0, self.row0 + self.width)

    @property
    def columns(self) -> slice:
        """Its columns in the teacher's matrix."""
        return slice(self.column, self.column + self.width)


class TileEntry(NamedTuple):
    """A row of the table that tells a kernel which hidden units its tile computes."""

    teacher: int
    row0: int  # first row in the stacked weight
    column: int  # first column in the teacher's matrix
    num_columns: int  # at most a tile's
    column0: int  # columns of all teachers in front
    ld_k: int  # columns of the teacher's matrix: the stride between its rows


@dataclass(frozen=True)
class Layout:
    """Hidden widths per rung and teacher; 0 if a teacher has no projector on a rung."""

    widths_LT: tuple[tuple[int, ...], ...]

    @cached_property
    def width_T(self) -> tuple[int, ...]:
        """Columns K_t of each teacher's matrix."""
        return tuple(sum(column) for column in zip(*self.widths_LT, strict=True))

    @cached_property
    def column0_T(self) -> tuple[int, ...]:
        """Columns of all teachers in front of each."""
        return tuple(sum(self.width_T[:t]) for t in range(len(self.width_T)))

    @cached_property
    def total(self) -> int:
        """Hidden units per token."""
        return sum(self.width_T)

    @cached_property
    def even(self) -> bool:
        """True if every rung gives all teachers the same width: the usual case."""
        return all(len(set(rung)) == 1 for rung in self.widths_LT)

    @cached_property
    def rungs(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each rung."""
        column_T = [0] * len(self.width_T)
        found = []
        for rung in self.widths_LT:
            row0, blocks = 0, []
            for teacher, width in enumerate(rung):
                if width:
                    blocks.append(Block(teacher, row0, column_T[teacher], width))
                row0 += width
                column_T[teacher] += width
            found.append(tuple(blocks))
        return tuple(found)

    @cached_property
    def align(self) -> int:
        """The largest power of two up to 16 that divides every width, and so every address."""
        return math.gcd(16, *(width for rung in self.widths_LT for width in rung))

    def columns(self, rung: int) -> list[slice]:
        """Columns of a rung's blocks if all teachers' matrices stood side by side."""
        starts = [(self.column0_T[b.teacher] + b.column, b.width) for b in self.rungs[rung]]
        return [slice(start, start + width) for start, width in starts]

    def block(self, rung: int, teacher: int) -> Block | None:
        """A teacher's block on a rung; None if it has no projector there."""
        return next((b for b in self.rungs[rung] if b.teacher == teacher), None)

    def matrix_of(self, flat: Tensor, teacher: int, rows: int) -> Tensor:
        """A teacher's [rows, K_t] matrix, a view into the flat buffer."""
        start = rows * self.column0_T[teacher]
        return flat[start : start + rows * self.width_T[teacher]].view(rows, self.width_T[teacher])


@lru_cache(maxsize=64)
def _layout(widths: tuple[int, ...], teachers: int) -> Layout:
    starts = range(0, len(widths), teachers)
    return Layout(tuple(widths[start : start + teachers] for start in starts))


def layout_of(widths: Sequence[int], teachers: int) -> Layout:
    """Return the layout that a custom op's flat list of widths, rung after rung, stands for."""
    return _layout(tuple(widths), teachers)
