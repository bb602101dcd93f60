"""Earlier stages of a run, as `--stages` gives them: options that differ, separated by `;`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from unic_ds.config.option import check
from unic_ds.files.printable import printable

STAGES = 100
"""The most stages of a run."""


@dataclass(frozen=True)
class Stage:
    """One earlier stage: the options in which it differs from the last one."""

    number: int  # from 1
    text: str
    options: dict[str, str]

    def describe(self) -> str:
        """Name of the stage in error messages."""
        return f"stage {self.number} of --stages ({printable(self.text)!r})"

    @property
    def folder(self) -> str:
        """The name of its folder in the run folder."""
        return f"stage{self.number}"


def parse(text: str) -> tuple[Stage, ...]:
    """The stages of `--stages`; ValueError for one that cannot be read."""
    count = text.count(";") + 1
    check(count <= STAGES, "stages", f"at most {STAGES}", count)
    stages: list[Stage] = []
    for part in filter(None, map(str.strip, text.split(";"))):
        stage = Stage(len(stages) + 1, part, {})
        try:
            stage.options.update(options_of(part))
        except ValueError as error:
            raise ValueError(f"{stage.describe()}: {error}") from None
        stages.append(stage)
    return tuple(stages)


def options_of(text: str) -> dict[str, str]:
    """Options written `name=value name=value`; ValueError for one that is given twice."""
    pairs = [word.partition("=") for word in shlex.split(text)]
    names = [name.removeprefix("--") for name, _, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{printable(twice[0])} is given twice; give it once")
    return dict(zip(names, (value for _, _, value in pairs), strict=True))
