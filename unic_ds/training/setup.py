"""What the loop works with: images, teachers, student and engine, made from a job."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from unic_ds import config
from unic_ds.config import job, overrides
from unic_ds.files.printable import printable

FEW = 8
"""Real images that a quantised teacher is judged by, and validation images that are tried."""

CHANCE = 1e-3
"""Least probability of what is found among a few images, if data.bad_limit holds for all."""


@dataclass
class Parts:
    """What the loop works with, in the order that a batch travels."""

    train: Any
    val: Any
    stream: Any
    teachers: Any
    cache: Any  # features of teachers that are not run, or None
    manifest: dict[str, Any]
    init: dict[str, dict[str, str]] | None  # hashes of the files that the student starts from
    engine: Any
    balance: Any
    guard: Any
    steps: int
    flops: float
    rollbacks: list[dict[str, Any]] = field(default_factory=list)  # how often it went back so far
    extension: dict[str, Any] = field(default_factory=dict)  # of a shorter run's checkpoint


def build(task: job.Job) -> Parts:
    """Images, teachers, student and engine of a job."""
    from unic_ds import dist
    from unic_ds.engine import deepspeed_engine
    from unic_ds.losses import balance
    from unic_ds.process import console
    from unic_ds.teachers.cache import FeatureCache
    from unic_ds.training.step_guard import StepGuard

    cfg, device = task.cfg, dist.device()
    train, val = find_images(cfg)
    held_out = f", {len(val)} held out" if val else ""
    console.say(f"{len(train)} training images in {cfg.data.train}{held_out}")
    check_validation(cfg, train, val)
    cache = None
    if cfg.cache:
        cache = FeatureCache(
            cfg.cache, cfg.teachers, augmentation_key(cfg, train), samples=len(train)
        )
    teachers, manifest = find_teachers(cfg, train, cache)
    student, init = start_student(task, teachers)
    flops = count_flops(cfg, teachers, device)
    if cfg.run.compiles("teachers"):
        teachers.compile()
    cost = f"{flops / 1e9:.1f} GFLOP an image for the whole step"
    console.say(f"student {cfg.student.model}, {cfg.student.size} px; {cost}")
    made = deepspeed_engine.build(student, cfg.optim, task.settings)
    guard = StepGuard(cfg.run.spike, everyone=dist.all_gather, device=device)
    deepspeed_engine.set_found_inf(made, guard.skip)
    return Parts(
        train=train,
        val=val,
        stream=open_stream(task, train, teachers.sizes, device, cache),
        teachers=teachers,
        cache=cache,
        manifest=manifest,
        init=init,
        engine=made,
        balance=balance.build(cfg).to(device),
        guard=guard,
        steps=cfg.optim.step_count(train.per_epoch),
        flops=flops,
    )


def find_teachers(cfg: config.Config, train: Any, cache: Any) -> tuple[Any, dict[str, Any]]:
    """The teachers on this rank's device, and their manifest, which is rank 0's."""
    from unic_ds import dist
    from unic_ds.models.encoder import grid_of
    from unic_ds.ops import KERNELS
    from unic_ds.process import console
    from unic_ds.teachers.teacher_set import TeacherSet

    teachers = TeacherSet(
        cfg.teachers,
        grid=grid_of(cfg.student),
        standardise=cfg.standardise,
        device=dist.device(),
        ops=KERNELS[cfg.kernels],
        cache=cache,
        sample=sample_images(cfg, train),
    )
    manifest = dist.on_rank_0(teachers.manifest)
    for name, facts in manifest.items():
        source = printable(facts["source"])  # a cache's manifest may be a stranger's
        console.say(f"teacher {name}: {source}, {facts['width']} wide, {facts['size']} px")
    for teacher in teachers.teachers.values():
        if teacher.fidelity:
            near = ", ".join(f"{kind} {value:.4f}" for kind, value in teacher.fidelity.items())
            console.say(f"teacher {teacher.name} in {teacher.row.precision}: cosine to bf16 {near}")
    return teachers, manifest


def start_student(task: job.Job, teachers: Any) -> tuple[Any, dict[str, dict[str, str]] | None]:
    """The student on this rank's device, and the hashes of the files that it starts from."""
    from unic_ds import dist
    from unic_ds.engine import deepspeed_engine
    from unic_ds.models.ladder import heads_of
    from unic_ds.models.student import Student
    from unic_ds.ops import KERNELS
    from unic_ds.weights import warm_start

    cfg = task.cfg
    make = partial(
        Student,
        cfg.student,
        cfg.ladder,
        heads_of(cfg, teachers.widths),
        seed=cfg.seed,
        ops=KERNELS[cfg.kernels],
        compiled=cfg.run.compiles("student"),
        gathered=deepspeed_engine.gathered,
    )
    student = deepspeed_engine.partitioned(make, task.settings).to(dist.device())
    return student, warm_start.start(task.init, student, teachers) if task.init else None


def find_images(cfg: config.Config) -> tuple[Any, Any]:
    """Training and validation images (None where there are none), the same on every rank."""
    from unic_ds import data, dist

    with dist.local_main_first():  # the first builds an index where there is none
        train, val = scan(cfg)
    if cfg.data.val_share:
        train, val = data.split(train, cfg.data.val_share, cfg.seed)
    assert_same_on_all_ranks(train.fingerprint())
    return train, val


def scan(cfg: config.Config) -> tuple[Any, Any]:
    """Sources of --data.train and --data.val (None if not given), on this rank."""
    from unic_ds import data

    train = data.scan(cfg.data.train)
    return train, data.scan(cfg.data.val).relabelled(train.classes) if cfg.data.val else None


def can_evaluate(train: Any, val: Any) -> bool:
    """True if both sides have images of two classes or more, and a class in common."""
    if train is None or val is None:
        return False
    classes, held_out = (set(side.label_N[side.label_N >= 0].tolist()) for side in (train, val))
    return min(len(classes), len(held_out)) > 1 and bool(classes & held_out)


def check_validation(cfg: config.Config, train: Any, val: Any) -> None:
    """Try a few images that the evaluation will read, or say that there will be none.

    ValueError, on every rank, if too many of them cannot be read.
    """
    from unic_ds import dist
    from unic_ds.evaluate import table
    from unic_ds.process import console

    if not cfg.eval.on:
        return
    if not can_evaluate(train, val):
        console.say(f"no evaluation: {table.NEEDS}")
        return
    if problem := dist.broadcast_object(find_unreadable(cfg, val) if dist.rank() == 0 else ""):
        raise ValueError(problem)


def find_unreadable(cfg: config.Config, val: Any) -> str:
    """A sentence if a few labelled validation images tell that the evaluation would fail, or ""."""
    import numpy as np
    import torch

    from unic_ds import data
    from unic_ds.process import entry_point

    data.backend(cfg.data)  # raises its own error if there is no decoder
    labelled_N = np.flatnonzero(val.label_N >= 0)
    chosen = np.linspace(0, len(labelled_N) - 1, min(FEW, len(labelled_N))).astype(int)
    tried, shown = val.subset(labelled_N[chosen]), []
    batches = data.passes(
        tried,
        replace(cfg.data, bad_limit=1.0),
        sizes=(cfg.student.size,),
        batch=len(tried),
        indices=np.arange(len(tried)),
        device=torch.device("cpu"),
    )
    try:
        shown = [i for batch in batches for i in batch.index_B.tolist()]
    except ValueError as error:  # none can be read
        if not entry_point.is_expected(error):
            raise
    bad = [name for i, name in enumerate(tried.names) if i not in shown]
    if not exceeds_bad_limit(len(bad), len(tried), limit=cfg.data.bad_limit, total=len(labelled_N)):
        return ""
    named = ", ".join(printable(name, 80) for name in bad)
    return (
        f"{len(bad)} of {len(tried)} validation images that were tried, below"
        f" {str(val.folder)!r}, cannot be read ({named}): the evaluation would fail after the last"
        " step; repair or remove such images, or train without evaluation: --eval.on false"
    )


def exceeds_bad_limit(bad: int, tried: int, *, limit: float, total: int) -> bool:
    """True if a `limit` for the share of bad images among `total` is passed, or all tried are bad.

    Passed for certain, or, by the binomial distribution, all but certainly.
    """
    chance = sum(
        math.comb(tried, k) * limit**k * (1 - limit) ** (tried - k) for k in range(bad, tried + 1)
    )
    allowed = max(1, limit * total)
    return bad == tried or bad > allowed or (total > tried and bad > 1 and chance < CHANCE)


def sample_images(cfg: config.Config, source: Any) -> Callable[[int], Any]:
    """A few of its images, from all over, at a side in pixels: uint8 B3HW on the CPU."""
    import numpy as np
    import torch

    from unic_ds import data

    indices = np.unique(np.linspace(0, len(source) - 1, FEW).astype(int))

    def at(size: int) -> Any:
        batches = data.passes(
            source,
            cfg.data,
            sizes=(size,),
            batch=FEW,
            indices=indices,
            device=torch.device("cpu"),
        )
        return next(iter(batches)).images[size]

    return at


def noise_images(size: int) -> Any:
    """As many images of noise."""
    import torch

    made = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (FEW, 3, size, size), dtype=torch.uint8, generator=made)


def augmentation_key(cfg: config.Config, train: Any) -> dict[str, Any]:
    """What the images and their augmentation depend on, but the seed."""
    from unic_ds.models.encoder import grid_of

    science = overrides.science(cfg)
    said: dict[str, Any] = {k: v for k, v in science.items() if k.startswith("data.")}
    said |= {"student.size": cfg.student.size, "grid": grid_of(cfg.student)}
    return said | {"images": train.fingerprint(), "decoder": decoder_of(cfg)}


def decoder_of(cfg: config.Config) -> str:
    """dali, dali on GPU or torch: decoders that give other pixels. nvJPEG is the second."""
    from unic_ds import data, dist

    found = data.backend(cfg.data)
    return "dali on GPU" if found == "dali" and dist.device().type == "cuda" else found


def open_stream(
    task: job.Job, train: Any, sizes: tuple[int, ...], device: Any, cache: Any = None
) -> Any:
    """This rank's batches of the training images, at the student's size and the teachers'.

    With a cache only its views are shown, and each batch brings their features.
    """
    from unic_ds import data, dist

    views = None
    if cache:
        read = partial(cache.read, pin=device.type == "cuda")
        views = data.Views(
            cache.seed, cache.views, lambda slots, on: read(slots.index_B, slots.epoch_B, on)
        )
    return data.Stream(
        train,
        task.cfg.data,
        seed=task.cfg.seed,
        sizes=(task.cfg.student.size, *sizes),
        batch_size=task.cfg.optim.batch_size,
        micro=task.settings.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        device=device,
        views=views,
    )


def assert_same_on_all_ranks(fingerprint: str) -> None:
    """RuntimeError unless every rank found the same images: their order is a function of them."""
    from unic_ds import dist

    if len(set(dist.all_gather_objects(fingerprint))) > 1:
        raise RuntimeError("the ranks see different images; wait until the folder is complete")


def count_flops(cfg: config.Config, teachers: Any, device: Any) -> float:
    """FLOPs of one image's step, counted: teachers forward, student forward, (twice) backward.

    The student's on tensors without contents: ZeRO-3 has not got it whole.
    """
    import torch

    from unic_ds.planning.counters import flop_counter
    from unic_ds.planning.trace import forward_flops

    images = {s: torch.zeros(1, 3, s, s, dtype=torch.uint8, device=device) for s in teachers.sizes}
    with torch.no_grad(), flop_counter() as counter:
        teachers.features(images)
    return counter.get_total_flops() + 3 * forward_flops(cfg, teachers.widths)


def fit_statistics(task: job.Job, parts: Parts) -> None:
    """Fix the targets' statistics by the first batches of the run, which training reads again."""
    from unic_ds import dist
    from unic_ds.process import console

    steps, start = task.cfg.standardise.fit_steps, time.monotonic()
    images = steps * task.cfg.optim.batch_size
    console.say(f"fitting the teachers' statistics to {images} images ({steps} batches)")
    count = steps * parts.engine.gradient_accumulation_steps()
    # A stream of its own: the log's share of time spent waiting is of training alone.
    teachers = parts.teachers
    stream = open_stream(task, parts.train, teachers.sizes, dist.device(), parts.cache)
    tokens = (teachers.features(batch.images, batch.beside) for batch in islice(stream, count))
    teachers.fit(console.track(tokens, count, "statistics"))
    stream.close()
    console.say(f"statistics fitted in {time.monotonic() - start:.1f} s")
