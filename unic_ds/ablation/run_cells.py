"""Trains the cells of a grid one after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from unic_ds import files
from unic_ds.ablation import child, reuse, shared_features
from unic_ds.ablation.cells import Run, Study
from unic_ds.ablation.shared_features import Features
from unic_ds.config import Config, overrides
from unic_ds.process import console
from unic_ds.report.wording import duration

SETTINGS = "settings.yaml"


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
    errors: dict[Path, str] = field(default_factory=dict)
    """Error of each feature cache that was made or checked; empty for one that can be used."""

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
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            cfg = replace(cfg, cache=self.cache_of(cfg, run))
        except ValueError as error:
            child.log_error(run.log, str(error))
            return False
        reuse.record(self.study, run)
        settings = write_settings(run.folder / SETTINGS, cfg)
        words = ["train", "--ds_config", self.study.ds_config, "--recipe", str(settings)]
        self.start([*words, "--out", str(run.folder)], self.study.ranks, run.log)
        return run.finished

    def cache_of(self, cfg: Config, run: Run) -> str:
        """The folder of the run's feature cache, which is made if it is missing; empty: live.

        ValueError if the folder holds other features.
        """
        if cfg.cache:
            return cfg.cache
        if why := shared_features.live_reason(self.study, run.cell, cfg):
            if self.study.views:
                console.say(f"{run.describe()}: its teachers run live: {why}")
            return ""
        found = shared_features.features_of(self.study, cfg)
        if found.folder not in self.errors:
            self.errors[found.folder] = self.store(found)
        why = self.errors[found.folder]
        if why and found.begun:
            raise ValueError(
                f"the features in {str(found.folder)!r} cannot be used ({why}); remove this folder,"
                " or choose another --out"
            )
        if why:
            console.say(f"{run.describe()}: its teachers run live, no features are stored: {why}")
        return "" if why else str(found.folder)

    def store(self, features: Features) -> str:
        """Make a feature cache, or check one that is complete; the error, empty if there is none.

        `unic-ds cache` compares images, settings and weights with those of the folder.
        """
        if features.complete:
            return self.run_cache(features)  # only reads: jobs need not wait for each other
        with shared_features.locked(features.folder):
            if not features.complete:
                console.say(f"storing the teachers' features; {features.log}")
            return self.run_cache(features)

    def run_cache(self, features: Features) -> str:
        """Run `unic-ds cache`; returns its error."""
        settings = write_settings(features.folder.with_suffix(".yaml"), features.cfg)
        words = ["cache", str(features.folder), "--recipe", str(settings)]
        words += ["--views", str(self.study.views)]
        if code := self.start(words, self.study.ranks, features.log):
            return child.last_error(features.log) or f"exit code {code}"
        features.done.touch()
        return ""


def write_settings(file: Path, cfg: Config) -> Path:
    """Write a Config as a recipe's file; returns its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(file, yaml.safe_dump(overrides.to_dict(cfg), sort_keys=False))
    return file
