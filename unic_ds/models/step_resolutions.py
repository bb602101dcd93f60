"""Sides, micro batches and shift of each step's images, a function of (seed, step).

A step draws one of `data.sizes` for the student, by the step of the order that it reads, so that a
sample keeps its side when steps are skipped. The number of images of a step does not change: at
each side they are split into the largest micro batches that `data.tokens` allows, for the largest
grid that the student or a teacher draws. So memory stays, and neither sample order, schedules nor
the answer depend on the split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from unic_ds import rng
from unic_ds.config import Config, check
from unic_ds.config.ds_config import DeepSpeedSettings
from unic_ds.models.encoder import grid_of, grids_of
from unic_ds.models.resolution import Resolution, Shift, StepShape


class StepResolutions:
    """The resolution of each step; `student.size` in all without `data.sizes`."""

    def __init__(
        self,
        cfg: Config,
        settings: DeepSpeedSettings,
        sides_of: Mapping[str, Mapping[int, int]] | None = None,
    ):
        """`sides_of` has the side of each teacher's images at each grid of the student.

        ValueError for sizes that the student does not take, for `data.tokens` below one image, and
        for a shift after which two images may have nothing in common.
        """
        self.cfg, self.sides_of = cfg, sides_of or {}
        self.sizes = cfg.data.sizes or (cfg.student.size,)
        self.grids = grids_of(cfg)
        smallest = min(self.grids)
        check(
            cfg.loss.shift < smallest,
            "loss.shift",
            f"below {smallest} patches, the student's grid",
            cfg.loss.shift,
        )
        self.settings = [settings_at(cfg, settings, grid) for grid in self.grids]
        self.places = {row.name: t for t, row in enumerate(cfg.teachers)}
        self.following = [name for name, at in self.sides_of.items() if len(set(at.values())) > 1]
        self.decoded = self.find_decoded()

    @property
    def most(self) -> int:
        """Images of the largest micro batch."""
        return max(settings.micro_batch for settings in self.settings)

    def find_decoded(self) -> list[str]:
        """A teacher of each row of sides that images are decoded at, besides the student's."""
        independent = self.cfg.data.size_draw == "independent"
        found: dict[tuple[tuple[int, ...], str], str] = {}
        for name, by_grid in self.sides_of.items():
            row = tuple(by_grid[grid] for grid in self.grids)
            found.setdefault((row, name if independent and len(set(row)) > 1 else ""), name)
        found.pop((self.sizes, ""), None)
        return [found[key] for key in sorted(found)]

    def choices(self, data_step: int) -> tuple[int, ...]:
        """Index in `sizes` of the student, then of each teacher, at a step of the order."""
        count = len(self.sizes)
        if count == 1:
            return (0,) * (1 + len(self.places))
        uniform = rng.uniform(self.cfg.seed, "size", 1 + len(self.places), data_step)
        if self.cfg.data.size_draw == "shared":
            uniform[:] = uniform[0]
        return tuple(int(u * count) for u in uniform)

    def shift_of(self, data_step: int) -> Shift | None:
        """The shift of a step of the order; None without `loss.shift`."""
        margin = self.cfg.loss.shift
        if not margin:
            return None
        uniform = rng.uniform(self.cfg.seed, "shift", 4, data_step)
        down, right, *teachers = (int(u * (margin + 1)) for u in uniform)
        return Shift(margin, (down, right), (teachers[0], teachers[1]))

    def of_step(self, data_step: int) -> Resolution:
        """The resolution of a step of the order (from 1)."""
        student, *teachers = self.choices(data_step)
        theirs = {name: teachers[self.places[name]] for name in self.sides_of}
        drawn = {student, *(theirs[name] for name in self.following)}
        settings = self.settings[max(drawn, key=lambda choice: self.grids[choice])]
        return Resolution(
            size=self.sizes[student],
            grid=self.grids[student],
            sides={
                name: by_grid[self.grids[theirs[name]]] for name, by_grid in self.sides_of.items()
            },
            micro_batch=settings.micro_batch,
            micro_batches=settings.accumulation,
            shift=self.shift_of(data_step),
        )

    def shape_of(self, data_step: int) -> StepShape:
        """Sides of the images that are decoded, the student's first, and the micro batch."""
        found = self.of_step(data_step)
        sides = (found.size, *(found.sides[name] for name in self.decoded))
        return StepShape(tuple(map(found.decoded, sides)), found.micro_batch)

    @property
    def reference(self) -> int:
        """Side of the decoded images of which a part are the student's of `student.size`."""
        grid = grid_of(self.cfg.student)
        usual = Resolution(self.cfg.student.size, grid, {}, 1, 1, self.shift_of(1))
        return usual.decoded(usual.size)


def at_size(cfg: Config, size: int) -> Config:
    """The settings of a run whose student has images of that side in all steps."""
    data = replace(cfg.data, sizes=(), size_draw="shared", tokens=0)
    return replace(cfg, data=data, student=replace(cfg.student, size=size))


def settings_at(cfg: Config, settings: DeepSpeedSettings, grid: int) -> DeepSpeedSettings:
    """The settings with the micro batch of a step in which the student has that patch grid.

    ValueError if `data.tokens` is below one image.
    """
    if not cfg.data.sizes:
        return settings
    budget = cfg.data.tokens or settings.micro_batch * grid_of(cfg.student) ** 2
    needed, largest = max(grids_of(cfg)) ** 2, f"one image of {max(cfg.data.sizes)} px"
    if budget < needed and cfg.data.tokens:
        raise ValueError(
            f"data.tokens {budget} is less than the {needed} patch tokens of {largest}; raise it,"
            " or drop it for the ds_config's micro batch"
        )
    if budget < needed:
        raise ValueError(
            f"the ds_config's micro batch of {settings.micro_batch} has {budget} patch tokens at"
            f" student.size {cfg.student.size}, less than {largest} ({needed}); give --data.tokens"
            f" {needed} or more"
        )
    return settings.within(budget // grid**2)
