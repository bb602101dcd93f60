"""A training step on tensors without contents: its FLOPs, what it keeps, what it holds at most.

Every shape and type is the real step's, and so is every operator, but for kernels' own scratch
memory; nothing is computed, so a ViT-g fits into a laptop.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unic_ds import balance, config
from unic_ds.counters import Live, Unfilled, flop_counter
from unic_ds.ladder import heads_of
from unic_ds.loss import distill_loss
from unic_ds.ops import KERNELS
from unic_ds.student import Student, grid_of
from unic_ds.teachers import cache as cache_of
from unic_ds.teachers import precision, sources
from unic_ds.teachers.teacher import DTYPE, Teacher
from unic_ds.tokens import Target, Tokens

AGAIN, AGAIN_ZERO3 = "recomputed", "recomputed under ZeRO-3"
"""FLOPs of blocks computed again: to the last tensor that backward wants; ZeRO-3's to the end."""


@dataclass(frozen=True)
class Trace:
    """One micro batch of `images`; FLOPs of all of it, bytes of one rank."""

    images: int
    flops: dict[
        str, float
    ]  # teacher NAME, encoder forward, ladder forward, backward, AGAIN, AGAIN_ZERO3
    kept: dict[str, int]  # for backward: encoder, ladder and loss
    targets: int  # bytes of the teachers' tokens
    teachers_peak: int  # beyond weights and targets, while a teacher runs
    step_peak: int  # beyond weights, targets and gradients, while the student runs
    encoder: int  # parameters, by part
    ladder: int
    frozen: int  # parameters of the student that are not trained
    teachers: dict[str, tuple[int, int]]  # name -> (parameters, bytes of all its weights)
    widths: dict[str, int]
    tokens: int  # patch tokens of an image


def between(few: Trace, many: Trace, images: int) -> Trace:
    """The trace of another micro batch: FLOPs and bytes are affine in its images."""
    share = (images - few.images) / (many.images - few.images)

    def line(a: float, b: float) -> float:
        return a + share * (b - a)

    return replace(
        few,
        images=images,
        flops={name: line(a, many.flops[name]) for name, a in few.flops.items()},
        kept={name: round(line(a, many.kept[name])) for name, a in few.kept.items()},
        targets=round(line(few.targets, many.targets)),
        teachers_peak=round(line(few.teachers_peak, many.teachers_peak)),
        step_peak=round(line(few.step_peak, many.step_peak)),
    )


class Run(NamedTuple):
    """What running one teacher on a micro batch costs."""

    flops: float
    parameters: int
    nbytes: int  # of its weights, on all ranks that share them
    peak: int  # beyond what a rank holds of its weights, and its tokens
    width: int


class Forward(NamedTuple):
    """A teacher's forward, its weights whole and of more than eight bits."""

    flops: float
    peak: int  # beyond its weights
    said: int  # bytes of its tokens
    teacher: Teacher


@cache
def forward_of(row: config.Teacher, grid: int, images: int) -> Forward:
    """Trace a teacher; ValueError where it cannot be built."""
    with Unfilled():
        source = sources.outline(row, grid=grid)
    teacher = Teacher(row, source, grid=grid, device=torch.device("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_cpu(teacher)
        image = torch.empty(images, 3, teacher.size, teacher.size, dtype=torch.uint8)
        given = (image, *teacher.parameters(), *teacher.buffers())
        with flop_counter() as counter, Live(given) as live:
            tokens = teacher(image)
    said = sum(x.nbytes for x in tokens)
    return Forward(float(counter.get_total_flops()), live.peak, said, teacher)


def run_of(row: config.Teacher, grid: int, images: int) -> Run:
    """What a teacher costs, in its precision and where its weights are placed.

    ValueError where it cannot be built.
    """
    at_once = min(images, row.micro or images)
    wide: dict[str, Any] = {"precision": "bf16"} if row.quantised else {}
    found = forward_of(replace(row, placement="replicate", micro=0, **wide), grid, at_once)
    teacher = found.teacher
    if row.quantised:
        precision.check_tower(row, teacher.tower.blocks())
    nbytes, gathered = held(row, teacher.tower)
    # The tokens of what it takes at once wait for the others', and are then put together.
    joined = found.said * images / at_once if at_once < images else 0
    return Run(
        flops=found.flops * images / at_once,
        parameters=teacher.parameter_count,
        nbytes=nbytes,
        peak=round(max(found.peak - found.said + gathered, joined)),
        width=teacher.width,
    )


def held(row: config.Teacher, tower: Any) -> tuple[int, int]:
    """(bytes of a teacher's weights, what it makes of them for its forward: at most, at once).

    Spread weights are gathered: those outside its blocks, a block, and the next one meanwhile.
    Weights of eight bits become a Linear's of bf16, or stay where what they multiply has eight too.
    """
    blocks = tower.blocks()
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    whole = sum(p.nbytes for p in tower.parameters())
    if row.quantised:
        eight, largest = precision.nbytes(blocks)
        linears = sum(linear.weight.nbytes for linear in precision.linears(blocks))
        expands = 0 if row.precision.endswith("_dynamic") else torch.bfloat16.itemsize
        return whole - linears + eight, expands * largest
    if row.placement == "replicate":
        return whole, 0
    return whole, whole - sum(sizes) + 2 * max(sizes, default=0)


def trace(cfg: config.Config, images: int, *, bf16: bool) -> Trace:
    """Trace a micro batch of a run; ValueError for teachers or a student that cannot be built."""
    grid = grid_of(cfg.student)
    runs = {row.name: run_of(row, grid, images) for row in cfg.teachers}
    widths = {name: run.width for name, run in runs.items()}
    for name in stored(cfg):  # whose tokens come with the images
        runs[name] = runs[name]._replace(flops=0.0, nbytes=0, peak=0)
    # The student does not see where its teachers' weights are, nor how the run is run.
    rows = tuple(replace(row, placement="replicate", micro=0) for row in cfg.teachers)
    found = student_of(replace(cfg, teachers=rows, run=config.Run()), images, bf16)
    before = accumulate([0, *found.targets.values()])  # tokens that wait while a later one runs
    return Trace(
        images=images,
        flops={f"teacher {name}": run.flops for name, run in runs.items()} | found.flops,
        kept=found.kept,
        targets=sum(found.targets.values()),
        teachers_peak=max(
            run.peak + done for run, done in zip(runs.values(), before, strict=False)
        ),
        step_peak=found.peak,
        encoder=found.encoder,
        ladder=found.ladder,
        frozen=found.frozen,
        teachers={name: (run.parameters, run.nbytes) for name, run in runs.items()},
        widths=widths,
        tokens=grid * grid,
    )


def stored(cfg: config.Config) -> list[str]:
    """Teachers whose tokens come from the feature cache; ValueError where that is none."""
    if not cfg.cache:
        return []
    manifest = cache_of.read_manifest(Path(cfg.cache))
    if manifest is None:
        raise ValueError(
            f"--teachers.cache {cfg.cache!r} holds no {cache_of.MANIFEST}; run `unic-ds cache"
            f" {cfg.cache}` with the same recipe, or drop the option"
        )
    return [row.name for row in cfg.teachers if row.name in manifest["teachers"]]


class Step(NamedTuple):
    """What a student's step costs, beside its teachers."""

    flops: dict[str, float]
    kept: dict[str, int]
    peak: int
    targets: dict[str, int]  # bytes of each teacher's tokens
    encoder: int  # parameters
    ladder: int
    frozen: int


@cache
def student_of(cfg: config.Config, images: int, bf16: bool) -> Step:
    """Trace a student's step; ValueError where it cannot be built."""
    grid, dtype = grid_of(cfg.student), torch.bfloat16 if bf16 else torch.float32
    widths = {row.name: run_of(row, grid, images).width for row in cfg.teachers}
    student = outline(cfg, widths).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_cpu(student)
        targets = {
            row.name: Tokens(
                torch.empty(images, widths[row.name], dtype=DTYPE[row.precision]),
                torch.empty(images, grid * grid, widths[row.name], dtype=DTYPE[row.precision]),
            )
            for row in cfg.teachers
        }
        flops, kept, peak = step(cfg, student, targets, images)
    if student.recomputed:
        plain = replace(cfg, student=replace(cfg.student, checkpoint="none"))
        flops[AGAIN] = flops["backward"] - student_of(plain, images, bf16).flops["backward"]
    own = list(student.parameters())
    trained = {p for p in own if p.requires_grad}
    return Step(
        flops=flops,
        kept=kept,
        peak=peak,
        targets={name: sum(x.nbytes for x in tokens) for name, tokens in targets.items()},
        encoder=sum(p.numel() for p in student.encoder.parameters() if p in trained),
        ladder=sum(p.numel() for p in student.ladder.parameters()),
        frozen=sum(p.numel() for p in own if p not in trained),
    )


def outline(cfg: config.Config, widths: dict[str, int]) -> Student:
    """A run's student on the meta device."""
    with torch.device("meta"), Unfilled():
        return Student(
            cfg.student,
            cfg.ladder,
            heads_of(cfg, widths),
            seed=cfg.seed,
            ops=KERNELS[cfg.kernels],
        )


def forward_flops(cfg: config.Config, widths: dict[str, int]) -> float:
    """FLOPs of the student's forward on one image; `widths` are the teachers' channels."""
    student, side = outline(cfg, widths), cfg.student.size
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), flop_counter() as counter:
        to_cpu(student)
        student(torch.empty(1, 3, side, side, dtype=torch.uint8))
    return float(counter.get_total_flops())


def step(
    cfg: config.Config, student: Student, targets: dict[str, Tokens], images: int
) -> tuple[dict[str, float], dict[str, int], int]:
    """(FLOPs by part, bytes kept for backward by part, bytes held at most) of a student's step."""
    for parameter in student.parameters():  # where gradients go is another matter: ZeRO's
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_grad)
    side = cfg.student.size
    image = torch.empty(images, 3, side, side, dtype=torch.uint8)
    path_BK = torch.empty(images, len(student.paths))
    drop_TB = torch.empty(len(cfg.teachers), images)
    weights = {p.untyped_storage()._cdata for p in student.parameters()}
    weights |= {x.untyped_storage()._cdata for tokens in targets.values() for x in tokens}
    kept: Counter[str] = Counter()
    part, seen = "encoder", set(weights)

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept[part] += storage.nbytes()
        return x

    totals, again = [0.0], list[float]()

    def mark() -> None:
        nonlocal part
        part = "ladder and loss"
        totals.append(flops_now())

    def flops_now() -> float:
        return float(counter.get_total_flops())

    def begin(_: Tensor) -> None:
        again.append(flops_now())

    given = (*student.parameters(), *(x for tokens in targets.values() for x in tokens))
    with flop_counter() as counter, Live(given) as live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            for block in student.recomputed:  # whose input is kept where no hook for it is called
                block.register_forward_pre_hook(lambda _, given: begin(pack(given[0])))
                block.register_forward_hook(lambda *_: again.append(flops_now() - again.pop()))
            hook = student.ladder.register_forward_pre_hook(lambda *_: mark())
            pred = student(image, path_BK)
            hook.remove()
            judged, _ = distill_loss(
                pred,
                {name: Target.of(tokens) for name, tokens in targets.items()},
                drop_TB,
                loss=cfg.loss,
                balance=balance.build(cfg),
                distances=cfg.distances,
                ops=KERNELS[cfg.kernels],
            )
        totals.append(flops_now())
        judged.backward()
        totals.append(flops_now())
    names = ("encoder forward", "ladder forward", "backward")
    flops = {n: b - a for n, a, b in zip(names, totals, totals[1:], strict=False)}
    return flops | {AGAIN: 0.0, AGAIN_ZERO3: sum(again)}, dict(kept), live.peak


def to_cpu(module: nn.Module) -> None:
    """Move a module from the meta device, in FakeTensorMode; a quarter of `to_empty`'s time."""
    module._apply(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu"))


def drop_grad(parameter: nn.Parameter) -> None:
    """Free a gradient as soon as it is there."""
    parameter.grad = None
