"""A run's folder: what it says the run is, and the checkpoints that it goes on from."""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import replace
from typing import IO, Any

from unic_ds import ds_config, job, override
from unic_ds.parts import Parts, fit_statistics

BALANCE, GUARD = "balance/", "guard/"
"""Before the entries of others among a checkpoint's statistics; no teacher's name has a slash."""

LEASE_S = 120.0
"""So long a file server may keep the lock of a node that is lost."""


def record(task: job.Job, manifest: dict[str, Any], whole: job.Job) -> IO[str]:
    """Write what the run is: config.yaml, teachers.json, ds_config.json; the folder's lock.

    `whole` is the run that `task` is a stage of. ValueError where another job holds the lock; where
    a launcher tries again by itself, after a while: it may be a lost node's.
    """
    import yaml

    from unic_ds import dist, events, files, log

    task.out.mkdir(parents=True, exist_ok=True)
    lock = (task.out / ".lock").open("a")
    if dist.rank() != 0:
        return lock
    try:
        free = hold(lock, 0.0)
        if not free and events.tries() is not None:
            log.say(
                f"another job, or a lost node, holds the lock of {str(task.out)!r};"
                f" waiting up to {LEASE_S:.0f} s for it"
            )
            free = hold(lock, LEASE_S)
        if not free:
            raise ValueError(
                f"another job trains in {str(task.out)!r}; end it, or choose another --out"
            )
    except OSError as error:  # Lustre without -o flock, for one
        log.say(f"{str(task.out)!r} cannot be locked ({error.strerror}): start no second job there")
    contents = {
        whole.out / "config.yaml": yaml.safe_dump(override.to_dict(whole.cfg), sort_keys=False),
        task.out / "config.yaml": yaml.safe_dump(override.to_dict(task.cfg), sort_keys=False),
        task.out / "teachers.json": json.dumps(manifest, indent=1) + "\n",
        task.out / "ds_config.json": json.dumps(task.settings, indent=1) + "\n",
    }
    for file, text in contents.items():
        files.write_whole(file, text)
    return lock


def hold(lock: IO[str], wait_s: float) -> bool:
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


def identity(task: job.Job, parts: Parts) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it."""
    from unic_ds import data, dist

    return {
        "images": parts.train.fingerprint(),
        "teachers": [[name, row["sha256"]] for name, row in parts.manifest.items()],
        "init": parts.init,
        "feature cache": parts.cache.identity if parts.cache else None,
        "decoder": data.backend(task.cfg.data),
        "ranks": dist.world(),
        "zero_stage": ds_config.stage(task.settings),
        "bf16": ds_config.bf16(task.settings),
        **{f"--{key}": value for key, value in override.science(task.cfg).items()},
    }


def save(task: job.Job, parts: Parts, step: int, *, loss: float) -> None:
    """Save a checkpoint after `step`, noting the training loss."""
    from unic_ds import checkpoint

    run = task.cfg.run
    checkpoint.save(
        parts.engine,
        task.out / "checkpoints",
        step,
        facts=identity(task, parts)
        | {"samples": step * task.cfg.optim.batch_size, "seed": task.cfg.seed, "loss": loss}
        | {"rollbacks": parts.rollbacks},
        statistics=parts.teachers.state_dict()
        | {f"{BALANCE}{k}": v for k, v in parts.balance.state_dict().items()}
        | {f"{GUARD}{k}": v for k, v in parts.guard.state_dict().items()},
        # What is saved while steps are skipped may not take the place of what was before them.
        keep=replace(run, keep_last=run.keep_last + parts.guard.streak),
    )


def resume(task: job.Job, parts: Parts) -> int:
    """Load the newest whole checkpoint, if there is one; the step it was saved after, else 0."""
    from unic_ds import checkpoint, log, rollback

    parts.rollbacks = rollback.settle(task.out)
    found = checkpoint.find(task.out / "checkpoints", task.resume)
    step = 0
    if found:
        facts, statistics = checkpoint.load(parts.engine, found, identity(task, parts))
        for prefix, part in ((BALANCE, parts.balance), (GUARD, parts.guard)):
            its = {k: statistics.pop(k) for k in list(statistics) if k.startswith(prefix)}
            part.load_state_dict({k.removeprefix(prefix): v for k, v in its.items()})
        parts.teachers.load_state_dict(statistics)
        parts.rollbacks = parts.rollbacks or facts["rollbacks"]
        step = facts["step"]
        log.say(f"resumed after step {step} from {found}")
    elif task.cfg.standardise.fitted:
        fit_statistics(task, parts)
    parts.stream.seek(step, rollback.left_out(parts.rollbacks))
    return step
