"""Trains the cells of a grid one after another, and evaluates the students of each seed at once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from unic_ds import files
from unic_ds.ablation import child, shared_features
from unic_ds.ablation.cells import LIVE, Run, Study
from unic_ds.config import Config, overrides
from unic_ds.evaluate import comparison
from unic_ds.process import console
from unic_ds.report.wording import duration

SETTINGS = "settings.yaml"
ASKED = "asked.json"
"""Models and settings of an evaluation: if they are the same, it is not repeated."""


@dataclass
class Trainer:
    """Trains runs, and counts."""

    study: Study
    start: child.Start = child.start
    total: int = 0
    """Runs to be trained, all calls together."""
    tried: int = 0
    """Runs that were started."""
    seconds: list[float] = field(default_factory=list)
    """Of each run that was trained."""
    live: set[str] = field(default_factory=set)
    """Caches that could not be made: their cells run live."""

    def train(self, runs: Sequence[Run]) -> list[Run]:
        """Train the runs that are not finished; returns those that failed."""
        failed = []
        for run in (run for run in runs if not run.finished):
            begun, self.tried = time.monotonic(), self.tried + 1
            count = f"run {self.tried} of {self.total}" if self.total else "run"
            console.say(f"{count}: {run.describe()}{self.left()}; {run.log}")
            if self.train_one(run):
                self.seconds.append(time.monotonic() - begun)
                continue
            failed.append(run)
            console.say(f"failed: {run.describe()}: {child.last_error(run.log)}")
        return failed

    def left(self) -> str:
        """Time that this and the other runs will take, by those that were trained."""
        if not self.seconds:
            return ""
        mean = sum(self.seconds) / len(self.seconds)
        return f", about {duration(mean * (self.total - self.tried + 1))} left"

    def train_one(self, run: Run) -> bool:
        """Train a run, on cached features if it can be; True if it is finished then."""
        cfg = self.study.config(run.cell, run.seed)
        cfg = replace(cfg, cache=self.cache_of(cfg, run))
        run.folder.mkdir(parents=True, exist_ok=True)
        settings = write_settings(run.folder / SETTINGS, cfg)
        words = ["train", "--ds_config", self.study.ds_config, "--recipe", str(settings)]
        self.start([*words, "--out", str(run.folder)], self.study.ranks, run.log)
        return run.finished

    def cache_of(self, cfg: Config, run: Run) -> str:
        """The folder of the run's feature cache, which is made if it is missing; empty: live."""
        if cfg.cache and cfg.cache != LIVE:
            return cfg.cache
        if why := shared_features.live_reason(self.study, cfg):
            if self.study.views:
                console.say(f"{run.describe()}: its teachers run live: {why}")
            return ""
        found = shared_features.features_of(self.study, cfg)
        if str(found.folder) in self.live:
            return ""
        if self.store(found):
            return str(found.folder)
        self.live.add(str(found.folder))
        why = child.last_error(found.folder.with_suffix(".log"))
        console.say(f"{run.describe()}: its teachers run live, since no features are stored: {why}")
        return ""

    def store(self, features: shared_features.Features) -> bool:
        """Make a feature cache unless it is complete; True if it is there."""
        folder, done = features.folder, features.folder.with_suffix(".done")
        with shared_features.locked(folder):
            if done.exists() and folder.is_dir():
                return True
            console.say(f"storing the teachers' features; {folder.with_suffix('.log')}")
            settings = write_settings(folder.with_suffix(".yaml"), features.cfg)
            words = ["cache", str(folder), "--recipe", str(settings)]
            words += ["--views", str(self.study.views)]
            code = self.start(words, self.study.ranks, folder.with_suffix(".log"))
            if code == 0:
                done.touch()
            return code == 0


def write_settings(file: Path, cfg: Config) -> Path:
    """Write a Config as a recipe's file; returns its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(file, yaml.safe_dump(overrides.to_dict(cfg), sort_keys=False))
    return file


def evaluation_folder(study: Study, seed: int) -> Path:
    """The folder of the evaluation of a seed's students."""
    return study.out / "eval" / f"seed{seed}"


def evaluate(study: Study, seed: int, start: child.Start = child.start) -> bool:
    """Evaluate the finished students of a seed and the teachers; False if it failed.

    Nothing is done if there are none, or the same evaluation is there.
    """
    runs = [run for run in study.runs() if run.seed == seed and run.finished]
    if not runs:
        return True
    folder = evaluation_folder(study, seed)
    cfg = replace(study.base, seed=seed)
    models = [f"{run.cell}={run.folder}" for run in runs]
    models += [row.name for row in cfg.teachers]
    words = ["eval", study.grid.tasks, "--models", ",".join(models), "--out", str(folder)]
    for name in ("eval.max_train", "eval.max_val"):  # `eval` takes all images unless it is given
        words += [f"--{name}", study.settings.get(name, "0")]
    asked = json.dumps([words, overrides.to_dict(cfg), [stamp(run) for run in runs]])
    if (folder / ASKED).is_file() and files.read_text(folder / ASKED) == asked:
        return True
    console.say(f"evaluation of {len(runs)} students and the teachers, seed {seed}")
    settings = write_settings(folder / SETTINGS, cfg)
    code = start([*words, "--recipe", str(settings)], study.ranks, folder / "eval.log")
    if code or not (folder / comparison.FILE).is_file():
        console.say(f"the evaluation failed: {child.last_error(folder / 'eval.log')}")
        console.say(f"its output is in {folder / 'eval.log'}; the same command tries it again")
        return False
    files.write_atomic(folder / ASKED, asked)
    return True


def stamp(run: Run) -> list[object]:
    """Time and size of a student's weights, which change if it is trained again."""
    status = (run.folder / "student" / "model.safetensors").stat()
    return [run.cell, status.st_mtime_ns, status.st_size]
