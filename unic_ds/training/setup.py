"""Build the objects of a training loop from a job: images, teachers, student and engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import config, data, dist
from unic_ds.config import data_spec, overrides
from unic_ds.config.job import Job
from unic_ds.data import Batch, Source, Stream
from unic_ds.engine import deepspeed_engine
from unic_ds.evaluate import table
from unic_ds.files.printable import printable
from unic_ds.harness import session
from unic_ds.harness.image_sets import can_evaluate, find_images
from unic_ds.losses import balance, dispersion
from unic_ds.models.encoder import grid_of, grids_of
from unic_ds.models.ladder import heads_of
from unic_ds.models.resolution import Resolution
from unic_ds.models.step_resolutions import StepResolutions, at_size
from unic_ds.models.student import Student
from unic_ds.planning.counters import flop_counter
from unic_ds.planning.trace import forward_flops
from unic_ds.process import console, entry_point
from unic_ds.teachers.cache import FeatureCache
from unic_ds.teachers.teacher import TeacherFacts
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import KINDS, Target, Tokens
from unic_ds.training import pictures, probes
from unic_ds.training.first_images import FirstImages
from unic_ds.training.phases import Phases, SetPhase
from unic_ds.training.state import RunContext, TrainState
from unic_ds.training.step_guard import StepGuard
from unic_ds.weights import warm_start
from unic_kernels.ops import KERNELS

NUM_SAMPLES = 8
"""Images on which a quantised teacher is compared with bf16; validation images tried at the start.
"""

RARE = 1e-3
"""If so many bad images are less probable than this at a share of data.bad_limit, it is exceeded.
"""

Init = dict[str, dict[str, str]] | None
"""Hashes of each file that a student starts from."""


def build(job: Job, set_phase: SetPhase) -> tuple[RunContext, TrainState]:
    """Images, teachers, student and engine of a job; its steps announce their phases."""
    cfg, device = job.cfg, dist.device()
    train, val = find_images(cfg)
    held_out = f", {len(val)} held out" if val else ""
    console.say(f"{len(train)} training images in {cfg.data.train}{held_out}")
    check_validation(cfg, train, val)
    probes.check(cfg, train, val)
    cache = open_cache(cfg, train)
    teachers, manifest = find_teachers(cfg, train, cache)
    student, init = start_student(job, teachers)
    resolutions = find_resolutions(job, teachers)
    flops = count_flops(cfg, teachers, device)
    if cfg.run.compiles("teachers"):
        teachers.compile(varying=cfg.chooses_pairs)
    cost = f"{flops / 1e9:.1f} GFLOP an image for the whole step"
    sides = ", ".join(map(str, cfg.data.sizes)) or cfg.student.size
    console.say(f"student {cfg.student.model}, {sides} px; {cost}")
    state = build_state(job, student, teachers, device)
    stream = open_stream(job, train, resolutions, device, cache)
    phases = announce_phases(state, set_phase, compiles=cfg.run.compile != "none")
    kept = pictures.AUGMENTED if cfg.probe.pictures else 0

    def student_images(batch: Batch) -> Tensor:
        resolution = resolutions.of_step(stream.data_step(state.step))
        return resolution.student_images(batch.images)

    first_images = FirstImages(stream, count=kept, images_of=student_images)
    run = RunContext(
        job=job,
        train=train,
        val=val,
        stream=stream,
        batches=phases.announced_items("reading data", first_images),
        first_images=first_images,
        resolutions=resolutions,
        targets_of=phases.announced("teachers", partial(targets_of, teachers)),
        cache=cache,
        manifest=manifest,
        init=init,
        flops_per_image=flops,
        phases=phases,
        sees_TM=sees(cfg, train),
        kinds_2M=token_kinds(cfg, train),
    )
    return run, state


def sees(cfg: config.Config, train: Source) -> NDArray[np.bool_] | None:
    """True for each teacher and source of a mixture whose images it sees; None if all see all."""
    if not any(row.domains for row in cfg.teachers):
        return None
    sees_TM = np.array([domains_of(row, train.part_names) for row in cfg.teachers])
    for row, sees_M in zip(cfg.teachers, sees_TM, strict=True):
        if not sees_M.any():
            raise ValueError(
                f"teachers.{row.name}.data {printable(row.data)!r}: none of these images are left"
                " for training; lower --data.val_share, or name other sources"
            )
    return sees_TM


def domains_of(row: config.Teacher, sources: Sequence[str]) -> list[bool]:
    """True for each source of the images that a teacher sees."""
    chosen = {i for name in row.domains for i in data_spec.indices_of(name, sources)}
    return [not row.domains or i in chosen for i in range(len(sources))]


def token_kinds(cfg: config.Config, train: Source) -> NDArray[np.bool_] | None:
    """True for each kind of token and source on whose images it is distilled; None: all.

    A source that has no images left for training is left out.
    """
    if not cfg.loss.kind_of_source:
        return None
    kinds_2M = np.ones((len(KINDS), len(train.part_names)), dtype=np.bool_)
    for name, only in cfg.loss.kind_of_source.items():
        for i in data_spec.indices_of(name, train.part_names):
            kinds_2M[:, i] = [kind == only for kind in KINDS]
    return kinds_2M


def build_state(
    job: Job, student: Student, teachers: TeacherSet, device: torch.device
) -> TrainState:
    """The state at step 0; the engine's optimiser skips the steps that the guard rejects."""
    engine = deepspeed_engine.build(student, job.cfg.optim, job.settings)
    guard = StepGuard(job.cfg.run.spike, all_gather_fn=dist.all_gather, device=device)
    deepspeed_engine.set_found_inf(engine, guard.found_inf)
    balancer = balance.build(job.cfg).to(device)
    student.keeps_shared = balancer.compares_gradients
    return TrainState(
        engine=engine,
        teachers=teachers,
        balancer=balancer,
        dispersions=dispersion.build(job.cfg, teachers.widths).to(device),
        guard=guard,
    )


def announce_phases(state: TrainState, set_phase: SetPhase, *, compiles: bool) -> Phases:
    """Let the student's forward, backward and the end of the step set the watchdog's phase."""
    phases = Phases(set_phase, lambda: state.step, compiles=compiles)
    state.engine.register_forward_pre_hook(lambda *_: phases.begin("student"))
    phases.announce_method(state.engine, "backward", "backward")
    phases.announce_method(state.guard, "end_step", "end of step")
    return phases


def targets_of(
    teachers: TeacherSet,
    batch: Batch,
    resolution: Resolution,
    pairs_TB: NDArray[np.bool_] | None = None,
) -> dict[str, Target]:
    """The teachers' standardised targets of a batch, which is added to their statistics.

    `pairs_TB` are the pairs of teacher and image to compute, all by default.
    """
    return teachers(batch.images, batch.extras, pairs_TB=pairs_TB, resolution=resolution)


def find_resolutions(job: Job, teachers: TeacherSet) -> StepResolutions:
    """The resolution of each step of a run with these teachers."""
    sides_of = teachers.sides_of(grids_of(job.cfg))
    for name, by_grid in sides_of.items():
        sides = list(dict.fromkeys(by_grid.values()))
        if len(sides) > 1:
            console.say(f"teacher {name} runs at {', '.join(map(str, sides))} px")
    if cached := ", ".join(teachers.cached) if job.cfg.data.sizes else "":
        side = job.cfg.student.size
        console.say(f"from the feature cache, so of images for {side} px in all steps: {cached}")
    return StepResolutions(job.cfg, job.settings, sides_of)


def open_cache(cfg: config.Config, train: Source) -> FeatureCache | None:
    """The feature cache of --teachers.cache, if there is one."""
    if not cfg.cache:
        return None
    return FeatureCache(cfg.cache, cfg.teachers, augmentation_key(cfg, train), samples=len(train))


def find_teachers(
    cfg: config.Config, train: Source, cache: FeatureCache | None
) -> tuple[TeacherSet, dict[str, TeacherFacts]]:
    """The teachers on this rank's device, and their manifest, which is rank 0's."""
    teachers = TeacherSet(
        cfg.teachers,
        grid=grid_of(cfg.student),
        standardise=cfg.standardise,
        device=dist.device(),
        ops=KERNELS[cfg.kernels],
        cache=cache,
        sample=sample_images(cfg, train),
        grids=grids_of(cfg),
    )
    manifest = dist.on_rank_0(teachers.manifest)
    for name, facts in manifest.items():
        source = printable(facts["source"])  # a cache's manifest may come from outside
        line = f"teacher {name}: {source}, {facts['width']} wide, {facts['size']} px"
        console.say(line + map_clause(facts, grid_of(cfg.student)))
    for teacher in teachers.teachers.values():
        if teacher.fidelity:
            cosines = ", ".join(f"{kind} {value:.4f}" for kind, value in teacher.fidelity.items())
            precision = f"teacher {teacher.name} in {teacher.row.precision}"
            console.say(f"{precision}: cosine to bf16 {cosines}")
    return teachers, manifest


def map_clause(facts: TeacherFacts, grid: int) -> str:
    """Clause about the patch map that is resized, a teacher's or the student's; or nothing."""
    own, target = math.isqrt(facts.get("tokens", grid**2)), facts.get("grid", grid)
    if target > grid:
        return f"; the student's {grid} x {grid} map is resized to its {target} x {target}"
    return f"; its {own} x {own} map is resized to {grid} x {grid}" if own != grid else ""


def start_student(job: Job, teachers: TeacherSet) -> tuple[Student, Init]:
    """The student on this rank's device, and the hashes of the files that it starts from."""
    cfg = job.cfg
    make = partial(
        Student,
        cfg.student,
        cfg.ladder,
        heads_of(cfg, teachers.widths),
        seed=cfg.seed,
        ops=KERNELS[cfg.kernels],
        compiled=cfg.run.compiles("student"),
        gathered=deepspeed_engine.gathered,
        any_size=bool(cfg.data.sizes),
    )
    student = deepspeed_engine.partitioned(make, job.settings).to(dist.device())
    return student, warm_start.start(job.init, student, teachers) if job.init else None


def check_validation(cfg: config.Config, train: Source, val: Source | None) -> None:
    """Read a few images that the evaluation will read, or print that there is no evaluation.

    ValueError, on every rank, if too many of them cannot be read, or for data of further tasks that
    is not in their layout.
    """
    if not cfg.eval.on:
        return
    session.open_sets_of_run(cfg, train, val)
    if val is None or not can_evaluate(train, val):
        console.say(f"no evaluation: {table.NEEDS}")
        return
    if problem := dist.broadcast_object(find_unreadable(cfg, val) if dist.rank() == 0 else ""):
        raise ValueError(problem)


def find_unreadable(cfg: config.Config, val: Source) -> str:
    """A sentence if a few labelled validation images show that the evaluation would fail, or ""."""
    data.backend(cfg.data)  # raises its own error if there is no decoder
    labelled_N = np.flatnonzero(val.label_N >= 0)
    chosen = np.linspace(0, len(labelled_N) - 1, min(NUM_SAMPLES, len(labelled_N))).astype(int)
    tried, readable = val.subset(labelled_N[chosen]), list[int]()
    batches = data.passes(
        tried,
        replace(cfg.data, bad_limit=1.0),
        sizes=(cfg.student.size,),
        batch=len(tried),
        indices=np.arange(len(tried)),
        device=torch.device("cpu"),
    )
    try:
        readable = [i for batch in batches for i in batch.index_B.tolist()]
    except ValueError as error:  # none can be read
        if not entry_point.is_expected(error):
            raise
    bad = [name for i, name in enumerate(tried.names) if i not in readable]
    if not exceeds_bad_limit(len(bad), len(tried), limit=cfg.data.bad_limit, total=len(labelled_N)):
        return ""
    names = ", ".join(printable(name, 80) for name in bad)
    return (
        f"{len(bad)} of {len(tried)} validation images that were tried, below"
        f" {str(val.folder)!r}, cannot be read ({names}): the evaluation would fail after the last"
        " step; repair or remove such images, or train without evaluation: --eval.on false"
    )


def exceeds_bad_limit(bad: int, tried: int, *, limit: float, total: int) -> bool:
    """True if all tried images are bad, or the share of bad ones among `total` exceeds `limit`.

    It is exceeded for certain, or so many bad images have a probability below `RARE` (binomial).
    """
    probability = sum(
        math.comb(tried, k) * limit**k * (1 - limit) ** (tried - k) for k in range(bad, tried + 1)
    )
    allowed = max(1, limit * total)
    return bad == tried or bad > allowed or (total > tried and bad > 1 and probability < RARE)


def sample_images(
    cfg: config.Config, source: Source, count: int = NUM_SAMPLES
) -> Callable[[int], Tensor]:
    """Function of a side in pixels: `count` images spread over a source, uint8 B3HW on the CPU.

    A source of fewer images gives all of them.
    """
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(int))

    def sample(size: int) -> Tensor:
        batches = data.passes(
            source,
            cfg.data,
            sizes=(size,),
            batch=count,
            indices=indices,
            device=torch.device("cpu"),
        )
        return next(iter(batches)).images[size]

    return sample


def noise_images(size: int) -> Tensor:
    """Images of noise, as many as `sample_images` returns, of `size` pixels: uint8 B3HW."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (NUM_SAMPLES, 3, size, size), dtype=torch.uint8, generator=generator
    )


def augmentation_key(cfg: config.Config, train: Source) -> dict[str, Any]:
    """Everything that the images and their augmentation depend on, except the seed."""
    science = overrides.science(cfg)
    key: dict[str, Any] = {k: v for k, v in science.items() if k.startswith("data.")}
    for name in ("data.sizes", "data.size_draw"):  # a cache has views for student.size
        del key[name]
    key |= {"student.size": cfg.student.size, "grid": grid_of(cfg.student)}
    return key | {"images": train.fingerprint(), "decoder": decoder_of(cfg)}


def decoder_of(cfg: config.Config) -> str:
    """dali, dali on GPU (nvJPEG) or torch: decoders whose pixels differ."""
    decoder = data.backend(cfg.data)
    return "dali on GPU" if decoder == "dali" and dist.device().type == "cuda" else decoder


def open_stream(
    job: Job,
    train: Source,
    resolutions: StepResolutions,
    device: torch.device,
    cache: FeatureCache | None = None,
) -> Stream:
    """This rank's batches of the training images, at the student's sides and the teachers'.

    With a cache only its views are read, and each batch has their features.
    """
    views = None
    if cache:
        read = partial(cache.read, pin=device.type == "cuda")
        views = data.Views(
            cache.seed, cache.views, lambda slots, on: read(slots.index_B, slots.epoch_B, on)
        )
    return Stream(
        train,
        job.cfg.data,
        seed=job.cfg.seed,
        sizes=(resolutions.reference, *resolutions.shape_of(1).sides[1:]),
        batch_size=job.cfg.optim.batch_size,
        micro=resolutions.most,
        rank=dist.rank(),
        world=dist.world(),
        device=device,
        views=views,
        shape_of=resolutions.shape_of,
    )


def count_flops(cfg: config.Config, teachers: TeacherSet, device: torch.device) -> float:
    """FLOPs of one image's step, counted: teachers forward, student forward, (twice) backward.

    Teachers count as often as dropping lets them compute an image; with `data.sizes` it is the mean
    over all sides.

    The student's are counted on the meta device, since ZeRO-3 has partitioned its weights.
    """
    grids = grids_of(cfg)
    with torch.no_grad(), flop_counter() as counter:
        for by_grid in teachers.by_grid.values():
            for teacher in (by_grid[grid] for grid in grids):
                side = teacher.size
                teacher(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    frozen = cfg.computed_share * counter.get_total_flops() / len(grids)
    sizes = cfg.data.sizes or (cfg.student.size,)
    forwards = [forward_flops(at_size(cfg, size), teachers.widths) for size in sizes]
    return frozen + 3 * sum(forwards) / len(forwards)


def fit_statistics(run: RunContext, state: TrainState) -> None:
    """Fix the targets' statistics by the first batches of the run, which training reads again."""
    steps, start, teachers = run.cfg.standardise.fit_steps, time.monotonic(), state.teachers
    images = steps * run.cfg.optim.batch_size
    console.say(f"fitting the teachers' statistics to {images} images ({steps} batches)")
    resolutions = map(run.resolutions.of_step, range(1, steps + 1))
    count = sum(resolution.micro_batches for resolution in resolutions)
    # A separate stream, so that its waits do not count in the log's data_wait_share.
    stream = open_stream(run.job, run.train, run.resolutions, dist.device(), run.cache)

    def features() -> Iterator[dict[str, Tokens]]:
        for resolution in map(run.resolutions.of_step, range(1, steps + 1)):
            for batch in islice(stream, resolution.micro_batches):
                rows = teachers.rows_of(run.seen_pairs(batch))
                yield teachers.features(batch.images, batch.extras, rows, resolution)

    teachers.fit(console.track(features(), count, "statistics"))
    stream.close()
    console.say(f"statistics fitted in {time.monotonic() - start:.1f} s")
