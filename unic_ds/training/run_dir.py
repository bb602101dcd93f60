"""The folder of a run: its lock, the files that describe it, and saving and resuming in it."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, TypedDict

import yaml

from unic_ds import dist, files
from unic_ds.config import extension, overrides, recipes
from unic_ds.config.job import Job
from unic_ds.engine import optim
from unic_ds.files import run_files, run_lock
from unic_ds.process import console
from unic_ds.teachers.teacher import TeacherFacts
from unic_ds.teachers.weight_files import known_by
from unic_ds.training import checkpoint, events, rollback, start_facts
from unic_ds.training.setup import decoder_of, fit_statistics
from unic_ds.training.state import RunContext, TrainState

BALANCE, DISPERSION, GUARD = "balance/", "dispersion/", "guard/"
"""Prefixes in a checkpoint's statistics, of tensors that are no teacher's; no teacher's name has a
slash."""

EXTENDED = (
    "extended from step {step} of {of} to {to} steps; the learning rate goes from {lr_before:.4g}"
    " to {lr:.4g}, on the schedule of the new length"
)

LEASE_S = 120.0
"""Seconds for which a file server may keep the lock of a node that is lost."""


class Extension(TypedDict):
    """The length that a run had, and has from now on: the event `extended`."""

    step: int  # of the checkpoint that it resumes from
    of: int  # steps before
    to: int  # steps now
    lr_before: float
    lr: float


def write_run_files(run: RunContext, extended: Extension | None, *, parent_job: Job) -> IO[str]:
    """Lock the folder of a stage; write its settings, teachers and start facts to it.

    Returns the lock. `parent_job` is the run of the stage, or the same job. The results of a
    shorter run are renamed first. ValueError if another job holds the lock; if torchrun restarts
    ranks, only after `LEASE_S`, since a lost node may hold it.
    """
    out = run.out
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / run_lock.FILE).open("a")
    if dist.rank() != 0:
        return lock
    acquire_lock_or_fail(lock, out)
    first_of_length = extension.pending(run.cfg, out) or not (out / "config.yaml").exists()
    set_aside(run)
    contents = {
        out / "config.yaml": settings_of(run.job),
        out / run_files.TEACHERS: json.dumps(run.manifest, indent=1) + "\n",
        out / "ds_config.json": json.dumps(run.job.settings.raw, indent=1) + "\n",
        out / run_files.START: json.dumps(start_facts.collect(run), indent=1) + "\n",
    }
    if not extension.pending(parent_job.cfg, parent_job.out):
        contents |= {parent_job.out / "config.yaml": settings_of(parent_job)}
    if extended and first_of_length:
        events.write(out, "extended", **extended)
    for file, text in contents.items():
        files.write_atomic(file, text)
    return lock


def acquire_lock_or_fail(lock: IO[str], out: Path) -> None:
    """Acquire the lock of a run folder, with a warning if that has no locks; ValueError if held."""
    try:
        free = acquire_lock(lock, 0.0)
        if not free and events.restart_count() is not None:
            console.say(
                f"another job, or a lost node, holds the lock of {str(out)!r};"
                f" waiting up to {LEASE_S:.0f} s for it"
            )
            free = acquire_lock(lock, LEASE_S)
        if not free:
            raise run_lock.refusal(out)
    except OSError as error:  # Lustre without -o flock, for one
        console.say(f"{str(out)!r} cannot be locked ({error.strerror}): start no second job there")


def settings_of(job: Job) -> str:
    """The text of a run's config.yaml, without --run.extend, which applies to one start only."""
    cfg = replace(job.cfg, run=replace(job.cfg.run, extend=False))
    return yaml.safe_dump(overrides.to_dict(cfg), sort_keys=False)


def set_aside(run: RunContext) -> None:
    """Rename the results of the shorter run that this one extends: names get their step.

    results.json is first, and config.yaml gets the new length later: after a kill at any moment the
    folder has either the old run or an extended one that is not finished.
    """
    if not extension.pending(run.cfg, run.out):
        return
    shorter = recipes.read(run.out / "config.yaml").optim
    step = f"step_{shorter.step_count(run.train.per_epoch):07d}"
    for name, aside in (
        ("results.json", f"results_{step}.json"),
        ("results.png", f"results_{step}.png"),
        ("evaluation.json", f"evaluation_{step}.json"),
        ("student", f"encoders/{step}"),
    ):
        if (run.out / name).exists():
            (run.out / aside).parent.mkdir(exist_ok=True)
            (run.out / name).rename(unused(run.out / aside))


def unused(path: Path) -> Path:
    """The path, or the first with _2, _3, ... before its suffix, that does not exist."""
    numbered = (path.with_name(f"{path.stem}_{n}{path.suffix}") for n in count(2))
    return next(free for free in chain([path], numbered) if not free.exists())


def acquire_lock(lock: IO[str], wait_s: float) -> bool:
    """Acquire a lock, waiting up to `wait_s` for it; False if another process still holds it.

    OSError if the file system has no locks.
    """
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
        time.sleep(min(1.0, wait_s))


def checkpoint_identity(run: RunContext) -> dict[str, Any]:
    """Facts that must be equal in a checkpoint and in the run that resumes from it."""
    init = {name: known_by(row) for name, row in (run.init or {}).items()} or None
    return {
        "images": run.train.fingerprint(),
        "teachers": [[name, known_by(row)] for name, row in run.manifest.items()],
        "init": init,
        "feature cache": run.cache.identity if run.cache else None,
        "decoder": decoder_of(run.cfg),
        "ranks": dist.world(),
        "zero_stage": run.job.settings.stage,
        "bf16": run.job.settings.bf16,
        **{f"--{key}": value for key, value in overrides.science(run.cfg).items()},
    }


def checkpoint_contents(run: RunContext) -> dict[str, str]:
    """Hash of each weight file of a run -> that of its tensors."""
    rows: list[Mapping[str, Any]] = [*run.manifest.values(), *(run.init or {}).values()]
    return {row["sha256"]: row["content"] for row in rows if row.get("content")}


def save(
    run: RunContext, state: TrainState, *, loss: float, probe: Mapping[str, checkpoint.ProbedValue]
) -> None:
    """Save a checkpoint of the state.

    `loss` is the training loss, and `probe` the values of a probe after this step, if there was
    one: by these the best are kept.
    """
    cfg = run.cfg
    progress: dict[str, Any] = {"samples": state.step * cfg.optim.batch_size}
    progress |= {"seed": cfg.seed, "loss": loss} | ({"probe": dict(probe)} if probe else {})
    summaries = {name: row["cls"] for name, row in run.manifest.items()}
    checkpoint.save(
        state.engine,
        run.out / "checkpoints",
        state.step,
        facts=checkpoint_identity(run)
        | progress
        | {"summaries": summaries, "rollbacks": state.rollbacks},
        statistics=state.teachers.state_dict()
        | {f"{BALANCE}{k}": v for k, v in state.balancer.state_dict().items()}
        | {f"{DISPERSION}{k}": v for k, v in state.dispersions.state_dict().items()}
        | {f"{GUARD}{k}": v for k, v in state.guard.state_dict().items()},
        # Checkpoints saved while steps are skipped may not replace those from before them.
        keep=replace(cfg.run, keep_last=cfg.run.keep_last + state.guard.streak),
    )


def resume(run: RunContext, state: TrainState) -> Extension | None:
    """Load the newest undamaged checkpoint into the state, or start at step 0 if there is none.

    Returns how the run is extended by this start, if it is.
    """
    state.rollbacks, state.step = rollback.prune_abandoned(run.out), 0
    extended = None
    if found := checkpoint.find(run.out / "checkpoints", run.job.resume):
        expected = checkpoint_identity(run)
        if run.cfg.run.extend:
            differing, extended = extend(run, found)
            expected |= differing
        load(run, state, found, expected)
        console.say(f"resumed after step {state.step} from {found}")
        if extended:
            console.say(EXTENDED.format(**extended))
    elif run.cfg.standardise.fitted:
        fit_statistics(run, state)
    run.stream.seek(state.step, rollback.skipped_spans(state.rollbacks))
    run.phases.restart(state.step + 1)
    return extended


def load(run: RunContext, state: TrainState, found: Path, expected: dict[str, Any]) -> None:
    """Load a checkpoint into the state; ValueError if it has other facts than `expected`."""
    contents = checkpoint_contents(run)
    facts, statistics = checkpoint.load(state.engine, found, expected, content_of=contents)
    refuse_other_summaries(str(found), facts.get("summaries", {}), run.manifest)
    for prefix, part in (
        (BALANCE, state.balancer),
        (DISPERSION, state.dispersions),
        (GUARD, state.guard),
    ):
        names = [name for name in statistics if name.startswith(prefix)]
        part.load_state_dict({k.removeprefix(prefix): statistics.pop(k) for k in names})
    state.teachers.load_state_dict(statistics)
    state.rollbacks = state.rollbacks or facts["rollbacks"]
    state.step = facts["step"]


def extend(run: RunContext, found: Path) -> tuple[dict[str, str], Extension | None]:
    """Facts of the checkpoint `found` in which an extended run may differ from it, and its lengths.

    ValueError if the run would have no steps left.
    """
    facts, here, images = extension.read_facts(found), run.cfg.optim, run.train.per_epoch
    differing = {name: facts[name] for key in extension.ALLOWED if (name := f"--{key}") in facts}
    epochs, steps = (differing[f"--{key}"] for key in extension.LENGTH)
    there, step = replace(here, epochs=float(epochs), steps=int(steps)), int(facts["step"])
    if there == here:
        return differing, None
    extension.check_longer(here, run.steps, after=step)
    extended: Extension = {
        "step": step,
        "of": there.step_count(images),
        "to": run.steps,
        "lr_before": optim.learning_rate(step, there, images),
        "lr": optim.learning_rate(step + 1, here, images),
    }
    return differing, extended


def refuse_other_summaries(
    checkpoint_path: str, saved: dict[str, str], manifest: Mapping[str, TeacherFacts]
) -> None:
    """ValueError if a checkpoint was trained on another kind of CLS target than `manifest` has.

    A checkpoint without kinds is from a version that had two.
    """
    for name, row in manifest.items():
        in_both = row["cls"] in ("token", "mean of patches")
        kind = saved.get(
            name, row["cls"] if in_both else "its CLS token or the mean of its patches"
        )
        if kind != row["cls"]:
            raise ValueError(
                f"checkpoint {checkpoint_path!r} was trained on another CLS target of teacher"
                f" {name!r}: {kind}, this run has {row['cls']}; start a new run in another"
                " --out, from weights alone by --student.init if you like"
            )
