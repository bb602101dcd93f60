"""The training loop: read this file first.

`train_step` is the method (UNIC, arXiv 2408.05088, section 3), `train_loop` logs, saves and stops
between steps, `run_stage` runs one stage from its images to its table. `setup` builds the objects
that they use; these set the watchdog's phase within a step, so `train_step` does not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import blocks, config, dist, rng
from unic_ds.config.job import Job, stop_files
from unic_ds.data import Batch
from unic_ds.engine import deepspeed_engine, determinism, optim
from unic_ds.losses.distill import distill_loss
from unic_ds.models.resolution import Resolution
from unic_ds.process import console, entry_point
from unic_ds.tokens import Target, Tokens
from unic_ds.training import (
    acceptance,
    events,
    final_eval,
    health_events,
    pictures,
    probes,
    rollback,
    watchdog,
)
from unic_ds.training.health_events import HealthEvents
from unic_ds.training.phases import SetPhase
from unic_ds.training.run_dir import resume, save, write_run_files
from unic_ds.training.run_log import RunLog
from unic_ds.training.run_report import RunReport
from unic_ds.training.setup import build
from unic_ds.training.state import RunContext, TrainState
from unic_ds.training.unreadable_images import UnreadableImages
from unic_kernels.ops import KERNELS

COLLECT_EVERY = 50
"""Steps after which Python's garbage is collected, if no log line came before."""

Metrics = dict[str, Tensor]
"""Scalars of a micro batch, and values per image [B], on the device."""


def train_step(run: RunContext, state: TrainState) -> list[Metrics]:
    """Take optimiser step `state.step`; return its micro batches' metrics.

    No host read, except for one after each full step of lazy dropping.
    """
    cfg, engine = run.cfg, state.engine
    optim.apply(engine.optimizer, optim.learning_rate(state.step, cfg.optim, run.train.per_epoch))
    metrics, resolution = [], run.resolution_of(state.step)
    run.phases.enter((resolution.size, *resolution.sides.values()))
    for left in reversed(range(resolution.micro_batches)):
        engine.set_gradient_accumulation_boundary(left == 0)
        batch = next(run.batches)
        drop_TB, path_BK, pairs_TB = draw_noise(run, state, batch)
        target = run.targets_of(batch, resolution, pairs_TB)  # standardised per channel
        pred = engine(resolution.student_images(batch.images), path_BK)
        kinds_2B = run.distilled_kinds(batch)
        loss, micro_metrics = compute_loss(run, state, pred, target, drop_TB, resolution, kinds_2B)
        state.guard.observe(loss)
        engine.backward(loss / resolution.micro_batches, scale_wrt_gas=False)
        engine.step()  # after the last micro batch: AdamW, unless the guard skips the step
        metrics.append(micro_metrics)
    taken = state.guard.end_step()
    state.teachers.track(optim.momentum(state.step, cfg.standardise, run.steps), taken)
    state.balancer.track(taken)
    state.dispersions.track(taken)
    return metrics


def train_loop(
    run: RunContext,
    state: TrainState,
    votes: dist.StepVotes,
    *,
    unreadable: UnreadableImages | None = None,
) -> None:
    """Train from the step after `state.step` until the last, or until `votes` stop it.

    `unreadable` are the images that this start has named before a roll-back.

    rollback.RollbackNeeded if too many steps in a row were skipped.
    """
    first = state.step + 1
    with open_log(run, first) as log, manual_garbage_collection():
        images = unreadable or UnreadableImages(run.out, run.stream)
        periodic = cadences(run, state, log, votes=votes, unreadable=images)
        for state.step in range(first, run.last_step + 1):
            metrics = train_step(run, state)
            for micro_metrics in metrics:
                log.add(micro_metrics, weight=1 / len(metrics) if run.cfg.data.sizes else 1.0)
            if state.step == first:
                seconds = console.since_start()
                console.say(f"first optimiser step done {seconds:.0f} s after the start")
            agreed = votes.agreed()
            last = agreed.stop or state.step == run.last_step
            for cadence in periodic:
                if cadence.due(state.step, last=last, requested=agreed.save, stop=agreed.stop):
                    cadence.action()
            if last:
                break


def run_stage(job: Job, set_phase: SetPhase, *, parent_job: Job) -> bool:
    """Train until the last step, then export and evaluate; False if it stopped before.

    `job` is a stage of the run `parent_job`, whose last stage is `parent_job` itself. It saves and
    stops when the run's stop file exists, or after SIGUSR1 or SIGTERM to any rank.
    """
    events.raise_last(job.out)
    with events.record_refusals(job.out):
        with entry_point.warnings_held():
            run, state = build(job, set_phase)
        set_phase("resuming", 0)
        extended = resume(run, state)
        lock = write_run_files(run, extended, parent_job=parent_job)
    if state.step and not extended:
        events.write(run.out, "resumed", step=state.step, ranks=dist.world())
    stops = stop_files(parent_job.out, parent_job.cfg.run.stop_file)
    votes = dist.StepVotes(*stops, save_s=60 * job.cfg.run.save_minutes)
    train_with_rollbacks(run, state, votes)
    run.stream.close()
    if finished := state.step == run.steps:
        votes.close()
        set_phase("evaluating", state.step)
        with blocks.uncompiled(job.cfg.run.compile != "none"):
            final_eval.export_and_evaluate(
                run, state, open_log=partial(open_log, run, run.steps + 1)
            )
    else:
        console.say(
            f"stopped after step {state.step} of {run.steps}; the same command goes on from there"
        )
        if dist.rank() == 0:
            stops[0].unlink(missing_ok=True)  # it applies to this start only
    lock.close()
    return finished


def train_with_rollbacks(run: RunContext, state: TrainState, votes: dist.StepVotes) -> None:
    """Run `train_loop`, again from a checkpoint after each roll-back."""
    unreadable = UnreadableImages(run.out, run.stream)
    while True:
        try:
            return train_loop(run, state, votes, unreadable=unreadable)
        except rollback.RollbackNeeded as needed:
            run.phases.set_phase("resuming", needed.last)
            rollback.plan_rollback(run, state, needed)
            resume(run, state)


def draw_noise(
    run: RunContext, state: TrainState, batch: Batch
) -> tuple[Tensor, Tensor, NDArray[np.bool_] | None]:
    """Uniforms that decide teacher dropping (T, B) and drop path (B, K), and the pairs to compute.

    A function of seed, step and position in the global batch, not of the number of ranks. Pairs are
    None if all are computed. Uniforms are -1 for pairs that are not seen; in lazy steps they are 1
    and 0, since the pairs are kept.
    """
    position_B = batch.position_B
    cfg, step, paths = run.cfg, state.step, len(state.engine.module.paths)
    drop_position_B = position_B * (0 if cfg.drop.unit == "step" else 1)
    drop_BT = rng.uniform(cfg.seed, "teacher drop", len(cfg.teachers), step, drop_position_B)
    path_BK = rng.uniform(cfg.seed, "drop path", paths, step, position_B)
    drop_TB, device = drop_BT.T.copy(), state.engine.device
    seen_TB = run.seen_pairs(batch)
    if seen_TB is not None:
        drop_TB[~seen_TB] = -1
    kept_TB = state.balancer.choose_pairs(step, drop_TB)
    drop_TB = drop_TB if kept_TB is None else kept_TB.astype(np.float32)
    pairs_TB = seen_TB if kept_TB is None else kept_TB
    return to_device(drop_TB, device), to_device(path_BK, device), pairs_TB


def to_device(values: NDArray[np.floating | np.bool_], device: torch.device) -> Tensor:
    """Values as fp32 on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(values).float()
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def compute_loss(
    run: RunContext,
    state: TrainState,
    pred: Mapping[str, Tokens],
    target: Mapping[str, Target],
    drop_TB: Tensor,
    resolution: Resolution,
    kinds_2B: NDArray[np.bool_] | None = None,
) -> tuple[Tensor, Metrics]:
    """The distillation loss of a micro batch, by the settings of the run, and its metrics."""
    cfg = run.cfg
    return distill_loss(
        pred,
        target,
        drop_TB,
        loss=cfg.loss,
        balance=state.balancer,
        distances=cfg.distances,
        all_gather_fn=dist.all_gather_batch,
        ops=KERNELS[cfg.kernels],
        shared=state.engine.module.take_shared(),
        dispersions=state.dispersions.by_name(),
        overlaps=resolution.shift.overlaps(resolution.grid) if resolution.shift else None,
        kinds_2B=None if kinds_2B is None else to_device(kinds_2B, drop_TB.device) > 0,
    )


@dataclass(frozen=True)
class Cadence:
    """An action, and the steps after which it is due.

    It is due after every multiple of a number in `every` (0: never), after the last step of a
    start if `at_end`, and, while it is requested, after every multiple of `on_request` (0: never).
    Without `at_end` it is not due once the run is asked to stop: little time may be left.
    """

    action: Callable[[], object]
    every: Sequence[int]
    on_request: int = 0
    at_end: bool = True

    def due(self, step: int, *, last: bool, requested: bool, stop: bool = False) -> bool:
        """True if the action is due after `step`, which may be the last, or by request (`stop`)."""
        if stop and not self.at_end:
            return False
        periods = (*self.every, self.on_request if requested else 0)
        return (last and self.at_end) or any(period and step % period == 0 for period in periods)


def cadences(
    run: RunContext,
    state: TrainState,
    log: RunLog,
    *,
    votes: dist.StepVotes,
    unreadable: UnreadableImages,
) -> list[Cadence]:
    """Everything that happens every so many steps, in this order; every rank does it."""
    cfg, probe_every = run.cfg.run, run.cfg.probe.every
    by_probe = probe_every if cfg.keep_best and cfg.best_by != "loss" else 0
    saves = (cfg.save_every, cfg.keep_every, by_probe)
    drawn, watched = pictures.Pictures(run, state, log), HealthEvents(run, state)
    measured = probes.Probes(run, state, log, drawn)
    line_action = partial(write_log, run, state, log, watched=watched)
    logged = (cfg.log_every, *saves, probe_every)
    save_action = partial(save_checkpoint, run, state, log, votes=votes, measured=measured)
    return [
        # On all ranks at once, and while a GPU still computes.
        Cadence(gc.collect, every=(cfg.log_every, COLLECT_EVERY)),
        # Before the log line, which has its values.
        Cadence(measured.measure, every=(probe_every,), at_end=False),
        # Before the save: a checkpoint has the loss of a log line, and a roll-back skips the save.
        Cadence(line_action, every=logged),
        Cadence(watched.check, every=(health_events.LINES * cfg.log_every, *saves)),
        # After the log line, which has their number, and has waited for the device.
        Cadence(partial(unreadable.record, log), every=logged),
        Cadence(drawn.draw_augmented, every=logged),
        Cadence(save_action, every=saves, on_request=cfg.log_every),
        Cadence(RunReport(run.out).write, every=saves, on_request=cfg.log_every),
    ]


def write_log(run: RunContext, state: TrainState, log: RunLog, *, watched: HealthEvents) -> None:
    """Write a log line; rollback.RollbackNeeded if too many steps in a row were skipped."""
    rate = optim.learning_rate(state.step, run.cfg.optim, run.train.per_epoch)
    row, reason_PK = log.write(
        state.step,
        waited_s=run.stream.waited_s,
        bad=len(run.stream.bad),
        reason_K=state.guard.take_reasons(),
        lr=rate,
        grad_norm=deepspeed_engine.grad_norm(state.engine),
    )
    watched.add(row)
    rollback.check_skipped_steps(run, state, reason_PK)


def save_checkpoint(
    run: RunContext,
    state: TrainState,
    log: RunLog,
    *,
    votes: dist.StepVotes,
    measured: probes.Probes,
) -> None:
    """Save a checkpoint with the loss of the last log line, and the values of a probe."""
    run.phases.set_phase("saving", state.step)
    save(run, state, loss=log.last["loss"], probe=measured.facts(state.step))
    votes.saved()


def open_log(run: RunContext, first: int) -> RunLog:
    """The log of a start whose first step is `first`."""
    return RunLog(
        run.out,
        steps=run.steps,
        first=first,
        batch_size=run.cfg.optim.batch_size,
        flops_per_image=run.flops_per_image,
        cfg=run.cfg,
        report=partial(events.report_tracker, run.out),
        stops=(rollback.RollbackNeeded,),
    )


@contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Context manager without automatic garbage collection; `gc.collect` skips older objects.

    Automatic collection would start at a different moment on each rank, and all wait for each.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def run_stages(job: Job, stages: list[Job]) -> None:
    """Check a run, then train its unfinished stages in turn, until one is stopped."""
    if dist.local_rank() == 0:
        refuse_early(job, stages)
    for stage in stages:
        announce_stage(stage, job)
        with start_watchdog(stage) as dog, kernel_errors_explained(stage.cfg):
            finished = run_stage(stage, dog.set_phase, parent_job=job)
        if not finished:
            break


def refuse_early(job: Job, stages: list[Job]) -> None:
    """Check the run before its ranks connect; ValueError if it would be refused after that.

    The refusal is recorded in a run folder that exists, so that neither torchrun nor Slurm retries.
    """
    for stage in stages:
        events.raise_last(stage.out)
    with events.record_refusals(job.out) if job.out.is_dir() else nullcontext():
        acceptance.accept(stages, starting=True)


def announce_stage(stage: Job, job: Job) -> None:
    """Print which stage of a run begins, if there are several."""
    if job.before:
        number, student = [*job.before, job].index(stage) + 1, stage.cfg.student
        position = f"stage {number} of {len(job.before) + 1}"
        console.say(f"{position}: {student.model} at {student.size} px in {stage.out}")


def start_watchdog(stage: Job) -> watchdog.Watchdog:
    """Join the process group; return the watchdog, whose context aborts if a rank dies or hangs."""
    determinism.choose(stage.cfg.run.deterministic)
    with events.rendezvous_failures(stage.out):
        dist.start(timeout_s=watchdog.longest_timeout_s(stage.cfg.run))
    return watchdog.Watchdog(
        stage.out,
        stage.cfg.run,
        start=dist.broadcast_object(watchdog.new_start_id()),
        rank=dist.rank(),
        world=dist.world(),
    )


@contextmanager
def kernel_errors_explained(cfg: config.Config) -> Iterator[None]:
    """Context manager of a stage: errors of its kernels name the setting to change."""
    sizes = max(1, len(cfg.data.sizes))
    with blocks.from_scratch(cfg.run.compile != "none", sizes=sizes), determinism.explained():
        yield
