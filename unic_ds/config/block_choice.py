"""Student blocks that an option names: those with projectors, those that are recomputed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unic_ds.config.option import check


@dataclass(frozen=True)
class RungChoice:
    """Blocks with projectors: all, half (every second), middle, last, or 0-based like 2,5,8."""

    name: str  # empty if they are numbered
    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, option: str = "ladder.rungs") -> RungChoice:
        """Parse the option; ValueError for text that names no blocks."""
        if text in ("all", "half", "middle", "last"):
            return cls(text, ())
        known = bool(re.fullmatch(r"\d+(,\d+)*", text))
        check(known, option, "all, half, middle, last or block numbers like 2,5,8,11", text)
        return cls("", tuple(map(int, text.split(","))))

    def blocks(self, depth: int) -> list[int]:
        """0-based blocks of a student of `depth` blocks; ValueError if it does not have them."""
        named = {
            "all": range(depth),
            "half": range(depth - 1, -1, -2),
            "middle": [(depth - 1) // 2],
            "last": [depth - 1],
        }
        blocks = sorted(set(named.get(self.name, self.numbers)))
        if blocks[-1] >= depth:
            raise ValueError(
                f"ladder.rungs names block {blocks[-1]}; the student's last is {depth - 1}"
            )
        return blocks


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Blocks whose activations backward recomputes: `none`, `full`, or every K-th, `every:K`."""

    every: int  # 0: none, 1: all

    @classmethod
    def parse(
        cls, text: str, option: str = "student.activation_checkpointing"
    ) -> ActivationCheckpointing:
        """Parse the option; ValueError for text that is none of these."""
        if text in ("none", "full"):
            return cls(int(text == "full"))
        known = bool(re.fullmatch(r"every:[1-9]\d*", text))
        check(known, option, "none, full or every:K as in every:2", text)
        return cls(int(text.partition(":")[2]))

    def blocks(self, depth: int) -> range:
        """0-based blocks of a student of `depth` blocks that are recomputed."""
        return range(0, depth, self.every) if self.every else range(0)
