"""Distil teachers into a student: the entry point and the loop.

deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json [--recipe NAME] [--out DIR]
[--section.key value ...]
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The launcher puts this file's folder first on the path, where `data` or `log` would shadow
    # other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from unic_ds import config
from unic_ds.config import args, job, recipes
from unic_ds.config.verb import NoOptions, Verb
from unic_ds.engine import optim
from unic_ds.process import entry_point, interrupt

VERB = Verb(
    name="train",
    summary="train a student; the same command again resumes, a finished run prints its table",
    options=NoOptions,
    takes="job",
    usage="deepspeed unic_ds/train.py --ds_config FILE [--recipe R] [--section.key VALUE ...]\n"
    "       unic-ds train --ds_config FILE ...    (one process)",
)

COLLECT_EVERY = 50
"""Steps after which Python's garbage is collected, if no log line came before."""


def main(argv: Sequence[str]) -> int:
    """Check the command line, then train; the exit code."""
    interrupt.install()
    words, options = args.parse(argv)
    if args.wants_help(options):
        print(VERB.help())
        return 0
    if words:
        raise ValueError(
            f"{words[0]!r} belongs to no option; write --name value, and quote a value with spaces"
        )
    task = job.resolve(options)
    if task.finished:
        return show(task)
    os.environ["HF_HUB_OFFLINE"] = (
        "1"  # a compute node must not ask a hub; `unic-ds teachers fetch` does
    )
    stages = waiting(task)  # looked at before anything runs, when all ranks see the same
    if os.environ.get("LOCAL_RANK", "0") == "0":
        accept(task, stages)
    for stage in stages:
        announce(stage, task)
        with heart(stage) as beat, kernels(stage.cfg.run):
            done = distil(stage, beat, whole=task)
        if not done:
            break
    return 0


def accept(task: job.Job, stages: list[job.Job]) -> None:
    """ValueError for what the run would be refused for once its ranks have met.

    A run folder that is there gets the event by which neither torchrun nor Slurm tries again.
    """
    from unic_ds.training import acceptance, events

    for stage in stages:
        events.raise_last(stage.out)
    with events.record_refusals(task.out) if task.out.is_dir() else nullcontext():
        acceptance.accept(stages, starting=True)


def waiting(task: job.Job) -> list[job.Job]:
    """The stages of a run that are not finished, in order."""
    return [stage for stage in (*task.before, task) if not stage.finished]


def heart(stage: job.Job) -> Any:
    """Join the ranks; the context in which one that is dead or stuck ends the run."""
    from unic_ds import dist
    from unic_ds.engine import determinism
    from unic_ds.training import events, watchdog

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
def kernels(run: config.Run) -> Iterator[None]:
    """Context manager of a stage: errors about its kernels name the setting that mends them."""
    from unic_ds import blocks
    from unic_ds.engine import determinism

    with blocks.from_scratch(run.compile != "none"), determinism.explained():
        yield


def announce(stage: job.Job, task: job.Job) -> None:
    """Say which stage of how many begins."""
    if task.before and os.environ.get("RANK", "0") == "0":
        number, student = [*task.before, task].index(stage) + 1, stage.cfg.student
        of = f"stage {number} of {len(task.before) + 1}"
        print(f"{of}: {student.model} at {student.size} px in {stage.out}", flush=True)


def show(task: job.Job) -> int:
    """Print the table of a finished run, or why it has none; the exit code."""
    from unic_ds.evaluate import table

    if os.environ.get("RANK", "0") == "0":
        again = "--run.extend true trains longer, with more --optim.steps or --optim.epochs"
        print(f"{task.out} is finished (choose another --out to train again; {again})\n")
        rows, file = table.read(task.out / "results.json"), task.out / "config.yaml"
        cfg = recipes.read(file) if file.is_file() else task.cfg
        none = table.unevaluated(task.out / "student", on=cfg.eval.on)
        print(table.render(rows) if rows else none)
    return 0


def due(step: int, every: int, last: int) -> bool:
    """True if what happens every so many steps (0: never), and at the last, happens now."""
    return step == last or (every > 0 and step % every == 0)


def distil(task: job.Job, beat: Callable[[str, int], None], *, whole: job.Job) -> bool:
    """Train until the last step, then export and evaluate; False where it stopped before.

    `task` is a stage of the run `whole`, or that itself. `beat` is told what the rank is about to
    do. It saves and stops when the run's stop file is there, or after SIGUSR1 or SIGTERM to any
    rank.
    """
    from unic_ds import blocks, dist
    from unic_ds.process import console
    from unic_ds.training import events, final_eval, rollback
    from unic_ds.training.run_dir import resume, write_run_files
    from unic_ds.training.setup import build

    events.raise_last(task.out)
    with events.record_refusals(task.out):
        with entry_point.warnings_held():
            parts = build(task)
        beat("resuming", 0)
        first, last = resume(task, parts) + 1, parts.steps
        lock = write_run_files(task, parts, whole)
    stops, run = job.stop_files(whole.out, whole.cfg.run.stop_file), task.cfg.run
    votes = dist.StepVotes(*stops, save_s=60 * run.save_minutes)
    step = None
    while step is None:
        try:
            step = learn(task, parts, first, votes=votes, beat=beat)
        except rollback.RollbackNeeded as setback:
            beat("resuming", setback.last)
            rollback.plan_rollback(task, parts, setback)
            first = resume(task, parts) + 1
    parts.stream.close()
    if step == last:
        votes.close()
        beat("evaluating", step)
        with blocks.uncompiled(run.compile != "none"):
            final_eval.export_and_evaluate(task, parts)
    else:
        console.say(f"stopped after step {step} of {last}; the same command goes on from there")
        if dist.rank() == 0:
            stops[0].unlink(missing_ok=True)  # it was meant for this start alone
    lock.close()
    return step == last


def learn(
    task: job.Job, parts: Any, first: int, *, votes: Any, beat: Callable[[str, int], None]
) -> int:
    """Train from step `first` until the last, or until `votes` stop it; the step it came to.

    rollback.Setback where too many steps in a row were skipped.
    """
    from unic_ds.engine.deepspeed_engine import grad_norm
    from unic_ds.process import console
    from unic_ds.training import rollback, run_log
    from unic_ds.training.run_dir import save

    run, last = task.cfg.run, parts.steps
    stop, step = min(run.stop_at or last, last), first - 1
    book = run_log.RunLog(
        task.out,
        steps=last,
        first=first,
        batch_size=task.cfg.optim.batch_size,
        flops_per_image=parts.flops,
    )
    with book, garbage_kept():
        for step in range(first, stop + 1):
            rate = optim.learning_rate(step, task.cfg.optim, parts.train.per_epoch)
            optim.apply(parts.engine.optimizer, rate)
            compiles = step == first and run.compile != "none"
            for metrics in optimise(task.cfg, parts, step, compiling(beat) if compiles else beat):
                book.add(metrics)
            if step == first:
                console.say(
                    f"first optimiser step done {console.since_start():.0f} s after the start"
                )
            agreed, logs = votes.agreed(), due(step, run.log_every, stop)
            saves = any(due(step, every, stop) for every in (run.save_every, run.keep_every))
            saves |= agreed.stop or (agreed.save and logs)
            if logs or step % COLLECT_EVERY == 0:
                gc.collect()  # on all ranks at once, and while a GPU still computes
            if saves or logs:
                row, verdict_PK = book.write(
                    step,
                    waited_s=parts.stream.waited_s,
                    bad=len(parts.stream.bad),
                    verdict_K=parts.guard.verdicts(),
                    lr=rate,
                    grad_norm=grad_norm(parts.engine),
                )
                rollback.check_skipped_steps(task, parts, step, verdict_PK)
            if saves:
                beat("saving", step)
                save(task, parts, step, loss=row["loss"])
                votes.saved()
            if agreed.stop:
                break
    return step


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Context manager in which Python's garbage waits for `gc.collect`, which skips what is there.

    Left to itself, Python collects on each rank at another moment, and all ranks wait for each.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def compiling(beat: Callable[[str, int], None]) -> Callable[[str, int], None]:
    """`beat` for a step that waits for torch.compile: one patient phase."""
    return lambda _, step: beat("compiling", step)


def optimise(
    cfg: config.Config, parts: Any, step: int, beat: Callable[[str, int], None]
) -> Iterator[dict[str, Any]]:
    """One optimiser step; the metrics of each of its micro batches, on the device."""
    from unic_ds import dist
    from unic_ds.losses.distill import distill_loss
    from unic_ds.ops import KERNELS

    engine, guard, teachers = parts.engine, parts.guard, parts.teachers
    for _ in range(engine.gradient_accumulation_steps()):
        beat("reading data", step)
        batch = next(parts.stream)
        drop_TB, path_BK = uniforms(cfg, step, batch.position_B, engine)
        beat("teachers", step)
        target = teachers(batch.images, batch.beside)
        beat("student", step)
        pred = engine(batch.images[cfg.student.size], path_BK)
        loss, metrics = distill_loss(
            pred,
            target,
            drop_TB,
            loss=cfg.loss,
            balance=parts.balance,
            distances=cfg.distances,
            all_gather_fn=dist.all_gather_batch,
            ops=KERNELS[cfg.kernels],
        )
        guard.see(loss)
        beat("backward", step)
        engine.backward(loss)
        engine.step()
        yield metrics
    beat("end of step", step)
    taken = guard.close()
    teachers.track(optim.momentum(step, cfg.standardise, parts.steps), taken)
    parts.balance.track(taken)


def uniforms(cfg: config.Config, step: int, position_B: Any, engine: Any) -> tuple[Any, Any]:
    """What decides teacher dropping (T, B) and drop path (B, K) at these places of the batch."""
    import torch

    from unic_ds import rng

    def to_device(values: Any) -> Any:
        tensor = torch.from_numpy(values).float()
        return (tensor.pin_memory() if engine.device.type == "cuda" else tensor).to(
            engine.device, non_blocking=True
        )

    place_B = position_B * (0 if cfg.drop.unit == "step" else 1)
    drop_BT = rng.uniform(cfg.seed, "teacher drop", len(cfg.teachers), step, place_B)
    path_BK = rng.uniform(cfg.seed, "drop path", len(engine.module.paths), step, position_B)
    return to_device(drop_BT.T.copy()), to_device(path_BK)


if __name__ == "__main__":
    entry_point.start(main, sys.argv[1:], trains=True)
