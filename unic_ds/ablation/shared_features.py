"""Feature caches that cells share: which cells can have one, and where it is."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from unic_ds.ablation.cells import Study
from unic_ds.config import Config, Teacher, overrides
from unic_ds.process import console

ROW = ("name", "source", "size", "resize", "patch", "mean", "std", "block", "precision")
"""Settings of a teacher on which its features depend."""


@dataclass(frozen=True)
class Features:
    """A feature cache, and the settings that it is made with."""

    folder: Path
    cfg: Config

    @property
    def log(self) -> Path:
        """File with the output of `unic-ds cache`."""
        return self.folder.with_suffix(".log")

    @property
    def done(self) -> Path:
        """File that exists once all features are stored."""
        return self.folder.with_suffix(".done")

    @property
    def begun(self) -> bool:
        """True if the folder holds features."""
        return (self.folder / "manifest.json").exists()

    @property
    def complete(self) -> bool:
        """True if all features were stored."""
        return self.done.exists() and self.begun


def live_reason(study: Study, cell: str, cfg: Config) -> str:
    """The reason for which a run's teachers run live; empty if it trains on cached features."""
    if study.live(cell):
        return "teachers.cache is none"
    if cfg.cache:
        return f"teachers.cache is {cfg.cache}"
    if study.views == 0:
        return "--views 0"
    if cfg.loss.shift:
        return "loss.shift needs images that are shifted"
    if cfg.stages:
        return "stages may have images of other sizes"
    following = [row.name for row in cfg.teachers if not row.own_side]
    if cfg.data.sizes and following:
        return f"data.sizes gives images of several sizes to {', '.join(following)}"
    return ""


def features_of(study: Study, cfg: Config) -> Features:
    """The feature cache of a run: of all teachers of the grid if the run's are among them."""
    ours = {row.name: facts_of(row) for row in cfg.teachers}
    theirs = {row.name: facts_of(row) for row in study.base.teachers}
    owner = study.base if ours.items() <= theirs.items() else cfg
    data = replace(cfg.data, sizes=(), size_draw="shared")
    made = replace(owner, data=data, student=cfg.student, seed=cfg.seed, cache="")
    rows = theirs if owner is study.base else ours
    images = {k: v for k, v in overrides.science(made).items() if k.startswith("data.")}
    images |= {"train": made.data.train, "val": made.data.val, "model": made.student.model}
    facts = [images, made.student.size, made.seed, study.views, list(rows.items())]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return Features(study.out / "features" / f"{key}-seed{cfg.seed}", made)


def facts_of(row: Teacher) -> tuple[object, ...]:
    """All that a teacher's features depend on."""
    return tuple(getattr(row, key) for key in ROW)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager in which no other job of the grid makes the same cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("a") as lock:
        wait_for(lock, folder)
        yield


def wait_for(lock: IO[str], folder: Path) -> None:
    """Acquire a lock; a line says if another process holds it."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"another job stores the features in {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:  # Lustre without -o flock, for one
        console.say(f"{folder} cannot be locked ({error.strerror}): start one job at a time")
