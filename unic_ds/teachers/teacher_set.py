"""All teachers of a run: one call gives their standardised targets, by name in config order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unic_ds import config, dist
from unic_ds.blocks import compile_each, equal_blocks
from unic_ds.models.resolution import Resolution
from unic_ds.process import console
from unic_ds.teachers import quantisation, sources
from unic_ds.teachers.cache import FeatureCache
from unic_ds.teachers.phi_s import PhiS
from unic_ds.teachers.standardise import Standardiser
from unic_ds.teachers.teacher import Teacher, TeacherFacts, load
from unic_ds.tokens import Target, Tokens, to_grid
from unic_kernels.ops import FUSED, Ops

CachedTokens = Mapping[str, Tokens] | None
"""Tokens of the cached teachers by name, on the CPU."""
ANEW = "or start a new run in another --out, from weights alone by --student.init if you like"
KINDS: dict[str, type[Standardiser]] = {"channel": Standardiser, "phi_s": PhiS}


class TeacherSet:
    """Frozen teachers and their running statistics; only the statistics belong in a checkpoint.

    All ranks construct it together: the first of a node reads the weights, the others find them
    in its cache. ValueError if a teacher's weights are missing (on every rank, before any is
    read) or do not fit.
    """

    def __init__(
        self,
        rows: tuple[config.Teacher, ...],
        *,
        grid: int,
        standardise: config.Standardise,
        device: torch.device,
        ops: Ops = FUSED,
        cache: FeatureCache | None = None,
        sample: quantisation.Sample | None = None,
        grids: Sequence[int] = (),
    ):
        """Teachers that `cache` has are not run: their tokens come with each batch.

        `grids` are further patch grids that the student will have (multi-resolution): a teacher
        whose side follows the student's is built for each side, with shared weights.

        RuntimeError if a quantised teacher's tokens differ too much from its bf16 tokens on the
        images of `sample`.
        """
        if not rows:
            raise ValueError("no teachers; name some with --teachers NAME=SOURCE,...")
        self.device, self.cached = device, cache.facts if cache else {}
        self.resizes = {row.name: row.resize for row in rows}
        online = [row for row in rows if row.name not in self.cached]
        for row in online:
            sources.locate(row)
            quantisation.check_device(row, device)
        self.teachers: dict[str, Teacher] = {}
        self.by_grid: dict[str, dict[int, Teacher]] = {}
        for row in online:
            with dist.local_main_first():
                model = sources.read(row, grid)
            teacher = Teacher(row, model, grid=grid, device=device, sample=sample)
            quantisation.check_agreement(row.name, row.precision, teacher.fidelity)
            self.teachers[row.name] = teacher
            self.by_grid[row.name] = self.at_grids(teacher, grids)
        self.widths = {row.name: self.width_of(row.name) for row in rows}  # in config order
        kind = KINDS[standardise.kind if standardise.on else "channel"]
        self.norms = {}
        for name, width in self.widths.items():
            with blaming(name):
                self.norms[name] = kind(width, standardise, ops).to(device)
        self.standardise = standardise

    def at_grids(self, teacher: Teacher, grids: Sequence[int]) -> dict[int, Teacher]:
        """A teacher for each patch grid of the student; those of one side are one."""
        found, by_size = {teacher.grid: teacher}, {teacher.size: teacher}
        others = [grid for grid in grids if grid != teacher.grid and not teacher.row.own_side]
        for grid in others:
            facts = sources.architecture_facts(teacher.row, grid)
            if known := by_size.get(cast(int, facts.get("size"))):
                found[grid] = known
                continue
            with dist.local_main_first():
                model = sources.read(teacher.row, grid)
            if model.size not in by_size:
                made = Teacher(teacher.row, model, grid=grid, device=self.device)
                made.share_weights(teacher)
                by_size[model.size] = made
            found[grid] = by_size[model.size]
        return dict.fromkeys(grids, teacher) | found

    def sides_of(self, grids: Sequence[int]) -> dict[str, dict[int, int]]:
        """Side in pixels of each running teacher's images, at patch grids of the student."""
        return {
            name: {grid: by_grid[grid].size for grid in grids}
            for name, by_grid in self.by_grid.items()
        }

    def width_of(self, name: str) -> int:
        """Channels of a teacher that is cached or run."""
        return self.cached[name]["width"] if name in self.cached else self.teachers[name].width

    @property
    def sizes(self) -> tuple[int, ...]:
        """Image sides in pixels of the teachers that are run, each once, ascending."""
        return tuple(sorted({teacher.size for teacher in self.teachers.values()}))

    def __call__(
        self,
        images: dict[int, Tensor],
        cached: CachedTokens = None,
        *,
        pairs_TB: NDArray[np.bool_] | None = None,
        observe: bool = True,
        resolution: Resolution | None = None,
    ) -> dict[str, Target]:
        """Targets of uint8 images [B, 3, H, H], keyed by side H in pixels.

        `resolution` has the student's patch grid and the teachers' sides, if they are not those of
        the constructor. `cached` holds the tokens of the cached teachers. Each teacher runs on its
        images in `pairs_TB` alone, if given, in config order. `observe` adds what is computed to
        running statistics: off in validation. No host sync.
        """
        rows = self.rows_of(pairs_TB)
        targets = {}
        for name, tokens in self.features(images, cached, rows, resolution).items():
            norm = self.norms[name]
            if observe and self.standardise.running and len(tokens.cls_BC):
                norm.observe(tokens)
            if pairs_TB is None:
                targets[name] = norm(tokens)
            else:
                targets[name] = norm(spread(tokens, rows[name], pairs_TB.shape[1]))
                computed_B = torch.zeros(pairs_TB.shape[1], dtype=torch.bool, device=self.device)
                computed_B = computed_B.index_fill(0, rows[name], True)
                targets[name] = targets[name]._replace(computed_B=computed_B)
        return targets

    def rows_of(self, pairs_TB: NDArray[np.bool_] | None) -> dict[str, Tensor]:
        """Indices of each teacher's images on the device, which the host does not wait for."""
        if pairs_TB is None:
            return {}
        rows = {}
        for name, pair_B in zip(self.widths, pairs_TB, strict=True):
            row_R = torch.from_numpy(np.flatnonzero(pair_B))
            row_R = row_R.pin_memory() if self.device.type == "cuda" else row_R
            rows[name] = row_R.to(self.device, non_blocking=True)
        return rows

    def features(
        self,
        images: dict[int, Tensor],
        cached: CachedTokens = None,
        rows: Mapping[str, Tensor] | None = None,
        resolution: Resolution | None = None,
    ) -> dict[str, Tokens]:
        """Tokens of each teacher on its target's grid, not standardised, in its precision.

        `rows` are the indices of each teacher's images, by name; empty: all images. Cached maps,
        which are of the constructor's grid, are resized to that of `resolution`.
        """
        found = {}
        for name, tokens in (cached or {}).items():
            there = Tokens(*(x.to(self.device, non_blocking=True) for x in tokens))
            there = Tokens(*(x[rows[name]] for x in there)) if rows else there
            found[name] = self.resized(name, there, resolution.grid) if resolution else there
        for name, teacher in self.teachers.items():
            at_once = rows[name] if rows else None
            if resolution:
                teacher = self.of_side(name, resolution.sides[name])
                image_B3HW = resolution.teacher_images(images, name)
                found[name] = teacher(image_B3HW, at_once, grid=resolution.grid)
            else:
                found[name] = teacher(images[teacher.size], at_once)
        return {name: found[name] for name in self.widths if name in found}

    def of_side(self, name: str, side: int) -> Teacher:
        """The teacher that takes images of so many pixels."""
        return next(found for found in self.by_grid[name].values() if found.size == side)

    def resized(self, name: str, tokens: Tokens, grid: int) -> Tokens:
        """Cached tokens on the grid of the student, or on their own if that one is the target's."""
        own = round(tokens.patch_BNC.shape[1] ** 0.5)
        keeps = self.resizes[name] == "larger" and own > grid
        return tokens if keeps else to_grid(tokens, grid)

    def compile(self, *, varying: bool = False) -> None:
        """Compile the teachers' blocks; report teachers that have no equal blocks.

        `varying`: the number of images varies from call to call.
        """
        for name, by_grid in self.by_grid.items():
            towers = {id(found.tower): found.tower for found in by_grid.values()}
            for tower in towers.values():
                blocks = equal_blocks(tower.blocks(), of=tower)
                compile_each(blocks, varying=varying)
            if not blocks:
                console.say(f"teacher {name} is not compiled: it has no row of equal blocks")

    @torch.no_grad()
    def fit(self, batches: Iterable[dict[str, Tokens]]) -> None:
        """Fix the statistics by the features of all ranks; a ValueError names the teacher."""
        for batch in batches:
            for name, tokens in batch.items():
                if len(tokens.cls_BC):
                    self.norms[name].observe(tokens)
        for name, moments_PS2C in self.gather().items():
            with blaming(name):
                if moments_PS2C[:, 0].sum(0).min() < 2:
                    raise ValueError(
                        "it sees fewer than two images in the batches that its statistics are"
                        " fitted to; raise --standardise.fit_steps"
                    )
                self.norms[name].fit(moments_PS2C, dist.all_reduce_sum)
        # Broadcast: eigenvectors of the same matrix may differ between two machines.
        self.load_state_dict(
            dist.broadcast_object({k: v.cpu() for k, v in self.state_dict().items()})
        )

    def track(self, momentum: float, taken: Tensor | None = None) -> None:
        """Update running statistics at the end of an optimiser step: one collective, no host sync.

        Fitted ones do not change; none does if `taken` is false.
        """
        if self.standardise.running:
            for name, moments_PS2C in self.gather().items():
                self.norms[name].track(moments_PS2C, momentum, taken)

    def gather(self) -> dict[str, Tensor]:
        """Moments of each teacher's features on every rank, [P, 3, 2, C]: one collective."""
        shares = {name: norm.moments() for name, norm in self.norms.items()}
        flat_P = dist.all_gather(torch.cat([share.flatten() for share in shares.values()]))
        parts = flat_P.split([share.numel() for share in shares.values()], 1)
        return {
            name: part_P.unflatten(1, shares[name].shape)
            for name, part_P in zip(shares, parts, strict=True)
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Statistics as `TEACHER.mean_2C` and `.std_2C` (PHI-S: `.basis_2CC` and `.scale_2` too).

        Without the frozen weights.
        """
        return nn.ModuleDict(self.norms).state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load saved statistics; ValueError if they are of other teachers."""
        saved = sorted({name.split(".")[0] for name in state})
        if saved != sorted(self.norms):
            theirs, ours = ", ".join(saved), ", ".join(self.norms)
            raise ValueError(
                f"the checkpoint has statistics of {theirs}; this run's teachers are {ours}; use"
                f" the same, {ANEW}"
            )
        if state.keys() != self.state_dict().keys():
            theirs = "phi_s" if any(key.endswith(".basis_2CC") for key in state) else "channel"
            raise ValueError(
                f"the checkpoint's statistics are of --standardise.kind {theirs}, this run's of"
                f" {self.standardise.kind}; use the same, {ANEW}"
            )
        nn.ModuleDict(self.norms).load_state_dict(state)

    def manifest(self) -> dict[str, TeacherFacts]:
        """Facts of each teacher, for `teachers.json`; hashes weight files: call it once."""
        return {
            name: self.cached[name] if name in self.cached else self.teachers[name].facts()
            for name in self.widths
        }


def spread(tokens: Tokens, row_R: Tensor, images: int) -> Tokens:
    """Tokens of `images` images: those of the images `row_R` as given, 1 elsewhere.

    A term that divides by a target's length is finite there, and is multiplied by 0.
    """
    full = (x.new_ones(images, *x.shape[1:]).index_copy_(0, row_R, x) for x in tokens)
    return Tokens(*full)


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Context manager that adds the teacher's name to a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"teacher {name!r}: {error}") from None


def fidelities(
    rows: tuple[config.Teacher, ...],
    *,
    grid: int,
    device: torch.device,
    sample: quantisation.Sample,
) -> list[dict[str, Any]]:
    """Agreement of each quantised teacher with its bf16 tokens, on the images of `sample`.

    A teacher with nothing to quantise has `linears` 0.
    """
    found: list[dict[str, Any]] = []
    for row in rows:
        quantisation.check_device(row, device)
        model = sources.read(row, grid)
        linears = len(quantisation.linears(model.tower.blocks()))
        facts: dict[str, Any] = {"name": row.name, "precision": row.precision, "linears": linears}
        if linears:
            facts |= Teacher(row, model, grid=grid, device=device, sample=sample).fidelity
        found.append(facts)
    return found


def describe(
    rows: tuple[config.Teacher, ...], *, grid: int, device: torch.device
) -> list[dict[str, Any]]:
    """Run an image through each teacher, one at a time; return a row of facts per teacher."""
    found = []
    for row in rows:
        teacher = load(row, grid=grid, device=device)
        ramp_H = torch.linspace(0, 255, teacher.size, device=device).to(torch.uint8)
        image_B3HW = ramp_H.expand(1, 3, teacher.size, teacher.size)
        start = time.perf_counter()
        tokens = teacher(image_B3HW)
        finite = all(bool(torch.isfinite(x).all()) for x in tokens)  # waits for the device
        seconds = time.perf_counter() - start
        shapes = {
            "cls_shape": list(tokens.cls_BC.shape),
            "patch_shape": list(tokens.patch_BNC.shape),
        }
        run = {"finite": finite, "seconds": round(seconds, 3)}
        found.append({"name": row.name, **teacher.facts(), **shapes, **run})
    return found
