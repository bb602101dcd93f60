"""Traces a training step on fake tensors: FLOPs, activations kept for backward, peak memory.

Shapes, dtypes and operators are those of a real step, except for scratch memory inside kernels;
nothing is computed, so a ViT-g fits into a laptop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unic_ds import config
from unic_ds.losses import balance
from unic_ds.losses.distill import distill_loss
from unic_ds.models.encoder import grid_of
from unic_ds.models.ladder import heads_of
from unic_ds.models.meta import NoInit
from unic_ds.models.student import Student
from unic_ds.planning.counters import Meter, Work, flop_counter
from unic_ds.teachers import cache as cache_of
from unic_ds.teachers import quantisation, sources
from unic_ds.teachers.adapters import Tower
from unic_ds.teachers.teacher import DTYPE, Teacher
from unic_ds.tokens import Target, Tokens
from unic_kernels.ops import KERNELS

RECOMPUTED, RECOMPUTED_ZERO3 = "recomputed", "recomputed under ZeRO-3"
"""FLOPs of recomputed blocks: up to the last tensor that backward uses; under ZeRO-3 all."""

PARTS = ("encoder forward", "ladder forward", "ladder backward", "encoder backward")
"""Parts of a student's step, in order; those of the ladder include the loss."""


@dataclass(frozen=True)
class Trace:
    """One micro batch of `images`; FLOPs of all of it, bytes of one rank."""

    images: int
    # teacher NAME, encoder forward, ladder forward, backward, RECOMPUTED, RECOMPUTED_ZERO3
    flops: dict[str, float]
    work: dict[str, Work]  # teacher NAME, encoder or ladder, forward or backward; once each
    kept: dict[str, int]  # for backward: encoder, ladder and loss
    targets: int  # bytes of the teachers' tokens
    teachers_peak: int  # beyond weights and targets, while a teacher runs
    step_peak: int  # beyond weights, targets and gradients, while the student runs
    encoder: int  # parameters, by part
    ladder: int
    frozen: int  # parameters of the student that are not trained
    matrices: int  # tensors of trained parameters
    teachers: dict[str, tuple[int, int]]  # name -> (parameters, bytes of all its weights)
    widths: dict[str, int]
    sizes: tuple[int, ...]  # sides of the images of student and teachers, in pixels
    tokens: int  # patch tokens of an image, on the student's grid
    features: int  # values of the teachers' tokens of an image


def between(few: Trace, many: Trace, images: int) -> Trace:
    """The trace of another micro batch: FLOPs and bytes are affine in its images."""
    share = (images - few.images) / (many.images - few.images)

    def line(a: float, b: float) -> float:
        return a + share * (b - a)

    return replace(
        few,
        images=images,
        flops={name: line(a, many.flops[name]) for name, a in few.flops.items()},
        work={name: a.combine(line, many.work[name]) for name, a in few.work.items()},
        kept={name: round(line(a, many.kept[name])) for name, a in few.kept.items()},
        targets=round(line(few.targets, many.targets)),
        teachers_peak=round(line(few.teachers_peak, many.teachers_peak)),
        step_peak=round(line(few.step_peak, many.step_peak)),
    )


class TeacherCost(NamedTuple):
    """Cost of one teacher on a micro batch."""

    work: Work
    parameters: int
    nbytes: int  # of its weights, on all ranks that share them
    peak: int  # beyond a rank's part of its weights, and its tokens
    width: int
    size: int  # of its images
    grid: int  # side of its targets' grid

    @property
    def flops(self) -> float:
        """FLOPs of all its kernels."""
        return self.work.flops


class TeacherForward(NamedTuple):
    """Cost of a teacher's forward, with unsharded weights of more than eight bits."""

    work: Work
    peak: int  # beyond its weights
    token_bytes: int
    teacher: Teacher


@cache
def outlined(row: config.Teacher, grid: int) -> Teacher:
    """A teacher on the meta device, run on two images; ValueError if it cannot be built or run."""
    with NoInit():
        source = sources.outline(row, grid=grid)
    return Teacher(row, source, grid=grid, device=torch.device("meta"))


@cache
def fake_teacher(row: config.Teacher, grid: int) -> tuple[Teacher, FakeTensorMode]:
    """A teacher whose weights are fake tensors of the mode."""
    teacher, mode = outlined(row, grid), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        to_cpu(teacher)
    return teacher, mode


@cache
def trace_forward(row: config.Teacher, grid: int, images: int) -> TeacherForward:
    """Trace a teacher's forward; ValueError if it cannot be built."""
    teacher, mode = fake_teacher(row, grid)
    with mode:
        image = torch.empty(images, 3, teacher.size, teacher.size, dtype=torch.uint8)
        inputs = (image, *teacher.parameters(), *teacher.buffers())
        with Meter(inputs) as meter:
            tokens = teacher(image)
    token_bytes = sum(x.nbytes for x in tokens)
    return TeacherForward(meter.work(), meter.peak, token_bytes, teacher)


def teacher_cost(row: config.Teacher, grid: int, images: int) -> TeacherCost:
    """Trace the cost of a teacher, with its precision and placement.

    ValueError if it cannot be built.
    """
    at_once = min(images, row.micro or images)
    wide: dict[str, Any] = {"precision": "bf16"} if row.quantised else {}
    found = trace_forward(replace(row, placement="replicate", micro=0, **wide), grid, at_once)
    teacher = found.teacher
    if row.quantised:
        quantisation.check_tower(row, teacher.tower.blocks())
    nbytes, gathered = weight_memory(row, teacher.tower)
    # With several forwards the tokens of all are kept until they are concatenated.
    joined = found.token_bytes * images / at_once if at_once < images else 0
    return TeacherCost(
        work=found.work.times(images / at_once),
        parameters=teacher.parameter_count,
        nbytes=nbytes,
        peak=round(max(found.peak - found.token_bytes + gathered, joined)),
        width=teacher.width,
        size=teacher.size,
        grid=teacher.target_grid,
    )


def weight_memory(row: config.Teacher, tower: Tower) -> tuple[int, int]:
    """(bytes of a teacher's weights, peak bytes of the copies that its forward makes of them).

    Sharded weights are gathered: those outside its blocks, those of a block and of the next one.
    Weights of eight bits are expanded to bf16 one Linear at a time, unless its inputs have eight
    bits too.
    """
    blocks = tower.blocks()
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    total = sum(p.nbytes for p in tower.parameters())
    if row.quantised:
        eight, largest = quantisation.nbytes(blocks)
        linears = sum(linear.weight.nbytes for linear in quantisation.linears(blocks))
        expands = 0 if row.precision.endswith("_dynamic") else torch.bfloat16.itemsize
        return total - linears + eight, expands * largest
    if row.placement == "replicate":
        return total, 0
    return total, total - sum(sizes) + 2 * max(sizes, default=0)


def trace(cfg: config.Config, images: int, *, bf16: bool) -> Trace:
    """Trace a micro batch of a run; ValueError for teachers or a student that cannot be built."""
    grid = grid_of(cfg.student)
    runs = {row.name: teacher_cost(row, grid, images) for row in cfg.teachers}
    widths = {name: run.width for name, run in runs.items()}
    for name in stored(cfg):  # their tokens are read with the images
        runs[name] = runs[name]._replace(work=Work(), nbytes=0, peak=0)
    share = cfg.computed_share
    runs = {name: run._replace(work=run.work.of_images(share)) for name, run in runs.items()}
    shown = (run.size for name, run in runs.items() if name not in stored(cfg))
    # Placement and machinery do not change the student's step, so that its trace is cached.
    rows = tuple(replace(row, placement="replicate", micro=0) for row in cfg.teachers)
    found = student_cost(replace(cfg, teachers=rows, run=config.Run()), images, bf16)
    before = accumulate([0, *found.targets.values()])  # tokens that wait while a later one runs
    return Trace(
        images=images,
        flops={f"teacher {name}": run.flops for name, run in runs.items()} | found.flops,
        work={f"teacher {name}": run.work for name, run in runs.items()} | found.work,
        kept=found.kept,
        targets=sum(found.targets.values()),
        teachers_peak=max(
            run.peak + done for run, done in zip(runs.values(), before, strict=False)
        ),
        step_peak=found.peak,
        encoder=found.encoder,
        ladder=found.ladder,
        frozen=found.frozen,
        matrices=found.matrices,
        teachers={name: (run.parameters, run.nbytes) for name, run in runs.items()},
        widths=widths,
        sizes=tuple(dict.fromkeys((cfg.student.size, *shown))),
        tokens=grid * grid,
        features=sum(run.width * (1 + run.grid**2) for run in runs.values()),
    )


def stored(cfg: config.Config) -> list[str]:
    """Names of teachers whose tokens come from the feature cache; ValueError if there is none."""
    if not cfg.cache:
        return []
    manifest = cache_of.read_manifest(Path(cfg.cache))
    if manifest is None:
        raise ValueError(
            f"--teachers.cache {cfg.cache!r} holds no {cache_of.MANIFEST}; run `unic-ds cache"
            f" {cfg.cache}` with the same recipe, or drop the option"
        )
    return [row.name for row in cfg.teachers if row.name in manifest["teachers"]]


class StudentCost(NamedTuple):
    """Cost of a student's step, without its teachers."""

    flops: dict[str, float]
    work: dict[str, Work]
    kept: dict[str, int]
    peak: int
    targets: dict[str, int]  # bytes of each teacher's tokens
    encoder: int  # parameters
    ladder: int
    frozen: int
    matrices: int  # tensors of trained parameters


@cache
def student_cost(cfg: config.Config, images: int, bf16: bool) -> StudentCost:
    """Trace a student's step; ValueError if it cannot be built."""
    grid, dtype = grid_of(cfg.student), torch.bfloat16 if bf16 else torch.float32
    costs = {row.name: teacher_cost(row, grid, images) for row in cfg.teachers}
    student = outline(cfg, {name: cost.width for name, cost in costs.items()}).to(dtype)
    student.keeps_shared = balance.build(cfg).compares_gradients
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_cpu(student)
        targets = {
            row.name: empty_tokens(costs[row.name], images, DTYPE[row.precision])
            for row in cfg.teachers
        }
        flops, work, kept, peak = step(cfg, student, targets, images)
    if student.recomputed:
        plain = replace(cfg, student=replace(cfg.student, activation_checkpointing="none"))
        without = student_cost(plain, images, bf16)
        flops[RECOMPUTED] = flops["backward"] - without.flops["backward"]
        work = without.work
    if cfg.balance.compares_gradients:  # the planner adds the second backward of the ladder
        plain = replace(cfg, balance=replace(cfg.balance, kind="fixed"))
        without = student_cost(plain, images, bf16)
        flops, work = without.flops, without.work
    parameters = list(student.parameters())
    trained = {p for p in parameters if p.requires_grad}
    return StudentCost(
        flops=flops,
        work=work,
        kept=kept,
        peak=peak,
        targets={name: sum(x.nbytes for x in tokens) for name, tokens in targets.items()},
        encoder=sum(p.numel() for p in student.encoder.parameters() if p in trained),
        ladder=sum(p.numel() for p in student.ladder.parameters()),
        frozen=sum(p.numel() for p in parameters if p not in trained),
        matrices=len(trained),
    )


def empty_tokens(cost: TeacherCost, images: int, dtype: torch.dtype) -> Tokens:
    """Tokens of a teacher, of no values."""
    return Tokens(
        torch.empty(images, cost.width, dtype=dtype),
        torch.empty(images, cost.grid**2, cost.width, dtype=dtype),
    )


def outline(cfg: config.Config, widths: dict[str, int]) -> Student:
    """A run's student on the meta device."""
    with torch.device("meta"), NoInit():
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


class KeptBytes:
    """Bytes of the tensors that autograd keeps for backward, by part of the step."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        self.part = "encoder"
        self.bytes: Counter[str] = Counter()
        self.seen = {x.untyped_storage()._cdata for x in inputs}

    def pack(self, x: Tensor) -> Tensor:
        """Count a tensor's storage once; for `saved_tensors_hooks`."""
        storage = x.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes[self.part] += storage.nbytes()
        return x


def watch_recomputed(blocks: Iterable[nn.Module], meter: Meter, kept: KeptBytes) -> list[float]:
    """Count the inputs of recomputed blocks; returns a list that gets the FLOPs of each forward."""
    flops: list[float] = []

    def begin(args: tuple[Tensor, ...]) -> None:
        kept.pack(args[0])  # torch calls no saved-tensor hook for it
        flops.append(meter.flops)

    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: begin(args))
        block.register_forward_hook(lambda *_: flops.append(meter.flops - flops.pop()))
    return flops


def step(
    cfg: config.Config, student: Student, targets: dict[str, Tokens], images: int
) -> tuple[dict[str, float], dict[str, Work], dict[str, int], int]:
    """(FLOPs by part, Work by part, bytes kept for backward by part, peak bytes) of a step."""
    for parameter in student.parameters():  # ZeRO decides where gradients are kept
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_grad)
    side = cfg.student.size
    image = torch.empty(images, 3, side, side, dtype=torch.uint8)
    path_BK = torch.empty(images, len(student.paths))
    drop_TB = torch.empty(len(cfg.teachers), images)
    inputs = (*student.parameters(), *(x for tokens in targets.values() for x in tokens))
    kept, marks = KeptBytes(inputs), [Work()]

    def mark() -> None:
        marks.append(meter.work())

    def begin_ladder() -> None:
        kept.part = "ladder and loss"
        mark()

    with Meter(inputs) as meter:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            recomputed = watch_recomputed(student.recomputed, meter, kept)
            # Backward reaches the last block after the ladder and the loss.
            last: nn.Module = student.encoder.blocks[-1]
            last.register_forward_hook(lambda *found: on_gradient(found[-1], mark))
            hook = student.ladder.register_forward_pre_hook(lambda *_: begin_ladder())
            pred = student(image, path_BK)
            hook.remove()
            loss, _ = loss_of(cfg, student, pred, targets, drop_TB)  # metrics live until the end
        mark()
        loss.backward()
        mark()
    found = {n: b.since(a) for n, a, b in zip(PARTS, marks, marks[1:], strict=False)}
    flops = {name: found[name].flops for name in PARTS[:2]}
    flops["backward"] = marks[-1].since(marks[2]).flops
    flops |= {RECOMPUTED: 0.0, RECOMPUTED_ZERO3: sum(recomputed)}
    return flops, found, dict(kept.bytes), meter.peak


def loss_of(
    cfg: config.Config,
    student: Student,
    pred: dict[str, Tokens],
    targets: dict[str, Tokens],
    drop_TB: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The distillation loss of a step, given the teachers' tokens, and its metrics."""
    return distill_loss(
        pred,
        {name: Target.of(tokens) for name, tokens in targets.items()},
        drop_TB,
        loss=cfg.loss,
        balance=balance.build(cfg),
        distances=cfg.distances,
        ops=KERNELS[cfg.kernels],
        shared=student.take_shared(),
    )


def on_gradient(x: Tensor, call: Callable[[], None]) -> None:
    """Call a function when the gradient of `x` is complete, before it is used."""
    x.register_hook(lambda _: call())


def to_cpu(module: nn.Module) -> None:
    """Move a module from the meta device, in FakeTensorMode; a quarter of `to_empty`'s time."""
    module._apply(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu"))


def drop_grad(parameter: nn.Parameter) -> None:
    """Free a gradient as soon as it is accumulated."""
    parameter.grad = None
