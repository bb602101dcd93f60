"""A run's folder: what it says the run is, and the checkpoints that it goes on from."""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from unic_ds.config import extension, job, overrides, recipes
from unic_ds.engine import optim
from unic_ds.training.setup import Parts, decoder_of, fit_statistics

BALANCE, GUARD = "balance/", "guard/"
"""Before the entries of others among a checkpoint's statistics; no teacher's name has a slash."""

EXTENDED = (
    "extended from step {step} of {of} to {to} steps; the learning rate goes from {lr_before:.4g}"
    " to {lr:.4g}, on the schedule of the new length"
)

LEASE_S = 120.0
"""So long a file server may keep the lock of a node that is lost."""


def write_run_files(task: job.Job, parts: Parts, whole: job.Job) -> IO[str]:
    """Write what the run is: config.yaml, teachers.json, ds_config.json; the folder's lock.

    `whole` is the run that `task` is a stage of. The results of a shorter run are set aside first.
    ValueError where another job holds the lock; where a launcher tries again by itself, after a
    while: it may be a lost node's.
    """
    from unic_ds import dist, files
    from unic_ds.process import console
    from unic_ds.training import events

    task.out.mkdir(parents=True, exist_ok=True)
    lock = (task.out / ".lock").open("a")
    if dist.rank() != 0:
        return lock
    try:
        free = acquire_lock(lock, 0.0)
        if not free and events.tries() is not None:
            console.say(
                f"another job, or a lost node, holds the lock of {str(task.out)!r};"
                f" waiting up to {LEASE_S:.0f} s for it"
            )
            free = acquire_lock(lock, LEASE_S)
        if not free:
            raise ValueError(
                f"another job trains in {str(task.out)!r}; end it, or choose another --out"
            )
    except OSError as error:  # Lustre without -o flock, for one
        console.say(
            f"{str(task.out)!r} cannot be locked ({error.strerror}): start no second job there"
        )
    extended = extension.pending(task.cfg, task.out) or not (task.out / "config.yaml").exists()
    set_aside(task, parts)
    contents = {
        task.out / "config.yaml": settings_of(task),
        task.out / "teachers.json": json.dumps(parts.manifest, indent=1) + "\n",
        task.out / "ds_config.json": json.dumps(task.settings.raw, indent=1) + "\n",
    }
    if not extension.pending(whole.cfg, whole.out):
        contents |= {whole.out / "config.yaml": settings_of(whole)}
    if parts.extension and extended:
        events.write(task.out, "extended", **parts.extension)
    for file, text in contents.items():
        files.write_whole(file, text)
    return lock


def settings_of(task: job.Job) -> str:
    """The text of a run's config.yaml; --run.extend is of one start, not of the run."""
    import yaml

    cfg = replace(task.cfg, run=replace(task.cfg.run, extend=False))
    return yaml.safe_dump(overrides.to_dict(cfg), sort_keys=False)


def set_aside(task: job.Job, parts: Parts) -> None:
    """Rename the results of the shorter run that `task` extends, by the step they are of.

    Before config.yaml says the new length, and results.json first: after a kill at any moment the
    run is either still the old one or an extended one that is not finished.
    """
    if not extension.pending(task.cfg, task.out):
        return
    shorter = recipes.read(task.out / "config.yaml").optim
    step = f"step_{shorter.step_count(parts.train.per_epoch):07d}"
    for name, aside in (
        ("results.json", f"results_{step}.json"),
        ("results.png", f"results_{step}.png"),
        ("student", f"encoders/{step}"),
    ):
        if (task.out / name).exists():
            (task.out / aside).parent.mkdir(exist_ok=True)
            (task.out / name).rename(unused(task.out / aside))


def unused(path: Path) -> Path:
    """That path, or the first with _2, _3, ... before its suffix at which there is nothing."""
    numbered = (path.with_name(f"{path.stem}_{n}{path.suffix}") for n in count(2))
    return next(free for free in chain([path], numbered) if not free.exists())


def acquire_lock(lock: IO[str], wait_s: float) -> bool:
    """Take a lock, for which another's is waited that long; OSError where there are no locks."""
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
        time.sleep(min(1.0, wait_s))


def checkpoint_identity(task: job.Job, parts: Parts) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it."""
    from unic_ds import dist
    from unic_ds.teachers.weight_files import known_by

    init = {name: known_by(row) for name, row in (parts.init or {}).items()} or None
    return {
        "images": parts.train.fingerprint(),
        "teachers": [[name, known_by(row)] for name, row in parts.manifest.items()],
        "init": init,
        "feature cache": parts.cache.identity if parts.cache else None,
        "decoder": decoder_of(task.cfg),
        "ranks": dist.world(),
        "zero_stage": task.settings.stage,
        "bf16": task.settings.bf16,
        **{f"--{key}": value for key, value in overrides.science(task.cfg).items()},
    }


def checkpoint_contents(parts: Parts) -> dict[str, str]:
    """Hash of each weight file of a run -> that of its tensors."""
    rows = (*parts.manifest.values(), *(parts.init or {}).values())
    return {row["sha256"]: row["content"] for row in rows if row.get("content")}


def save(task: job.Job, parts: Parts, step: int, *, loss: float) -> None:
    """Save a checkpoint after `step`, noting the training loss."""
    from unic_ds.training import checkpoint

    run = task.cfg.run
    checkpoint.save(
        parts.engine,
        task.out / "checkpoints",
        step,
        facts=checkpoint_identity(task, parts)
        | {"samples": step * task.cfg.optim.batch_size, "seed": task.cfg.seed, "loss": loss}
        | {"summaries": {name: row["cls"] for name, row in parts.manifest.items()}}
        | {"rollbacks": parts.rollbacks},
        statistics=parts.teachers.state_dict()
        | {f"{BALANCE}{k}": v for k, v in parts.balance.state_dict().items()}
        | {f"{GUARD}{k}": v for k, v in parts.guard.state_dict().items()},
        # What is saved while steps are skipped may not take the place of what was before them.
        keep=replace(run, keep_last=run.keep_last + parts.guard.streak),
    )


def resume(task: job.Job, parts: Parts) -> int:
    """Load the newest whole checkpoint, if there is one; the step it was saved after, else 0."""
    from unic_ds.process import console
    from unic_ds.training import checkpoint, rollback

    parts.rollbacks, parts.extension = rollback.prune_abandoned(task.out), {}
    found = checkpoint.find(task.out / "checkpoints", task.resume)
    step = 0
    if found:
        expected = checkpoint_identity(task, parts)
        if task.cfg.run.extend:
            expected |= extend(task, parts, found)
        facts, statistics = checkpoint.load(
            parts.engine, found, expected, content_of=checkpoint_contents(parts)
        )
        refuse_other_summaries(str(found), facts.get("summaries", {}), parts.manifest)
        for prefix, part in ((BALANCE, parts.balance), (GUARD, parts.guard)):
            its = {k: statistics.pop(k) for k in list(statistics) if k.startswith(prefix)}
            part.load_state_dict({k.removeprefix(prefix): v for k, v in its.items()})
        parts.teachers.load_state_dict(statistics)
        parts.rollbacks = parts.rollbacks or facts["rollbacks"]
        step = facts["step"]
        console.say(f"resumed after step {step} from {found}")
        if parts.extension:
            console.say(EXTENDED.format(**parts.extension))
    elif task.cfg.standardise.fitted:
        fit_statistics(task, parts)
    parts.stream.seek(step, rollback.skipped_spans(parts.rollbacks))
    return step


def extend(task: job.Job, parts: Parts, found: Path) -> dict[str, str]:
    """Facts of the checkpoint `found` in which an extended run may differ from it.

    `parts.extension` tells from there on by how much. ValueError if the run would not go on.
    """
    facts, here, images = extension.read_facts(found), task.cfg.optim, parts.train.per_epoch
    theirs = {name: facts[name] for key in extension.ALLOWED if (name := f"--{key}") in facts}
    epochs, steps = (theirs[f"--{key}"] for key in extension.LENGTH)
    there, step = replace(here, epochs=float(epochs), steps=int(steps)), int(facts["step"])
    if there != here:
        extension.check_longer(here, parts.steps, after=step)
        parts.extension = {
            "step": step,
            "of": there.step_count(images),
            "to": parts.steps,
            "lr_before": optim.learning_rate(step, there, images),
            "lr": optim.learning_rate(step + 1, here, images),
        }
    return theirs


def refuse_other_summaries(
    where: str, saved: dict[str, str], manifest: dict[str, dict[str, Any]]
) -> None:
    """ValueError if a checkpoint had another kind of summary of a teacher than `manifest` says.

    One without kinds is of a version that knew two.
    """
    for name, row in manifest.items():
        known = row["cls"] in ("token", "mean of patches")
        theirs = saved.get(
            name, row["cls"] if known else "its CLS token or the mean of its patches"
        )
        if theirs != row["cls"]:
            raise ValueError(
                f"checkpoint {where!r} was trained on another summary (CLS target) of teacher"
                f" {name!r}: {theirs}, this run has {row['cls']}; start a new run in another"
                " --out, from weights alone by --student.init if you like"
            )
