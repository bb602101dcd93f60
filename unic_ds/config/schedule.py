"""Options of the optimiser and of the training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unic_ds.config.option import check, check_most, option

SERVICES = ("wandb", "mlflow")
"""Services that a run may be logged to, besides log.jsonl and TensorBoard."""

STEPS = 9_999_999
"""The most steps of a run: step numbers in checkpoint names have seven digits."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its schedule and the length of the run."""

    batch_size: int = option(
        512, "images per optimiser step, over all ranks and micro batches", most=1 << 24
    )
    epochs: float = option(200.0, "passes over the training images", most=1e6)
    steps: int = option(0, "optimiser steps; 0: the number that optim.epochs gives", most=STEPS)
    lr: float = option(3e-4, "peak learning rate at a batch of optim.lr_batch images")
    lr_batch: int = option(256, "batch size that optim.lr is for", most=1 << 24)
    lr_scaling: Literal["linear", "sqrt", "none"] = option(
        "linear", "scaling of the peak learning rate with batch_size / lr_batch"
    )
    lr_end: float = option(1e-6, "learning rate at the end of the cosine schedule")
    warmup_epochs: float = option(10.0, "epochs of linear learning rate warm-up from 0", most=1e6)
    beta1: float = option(0.9, "beta1 of AdamW")
    beta2: float = option(0.99, "beta2 of AdamW")
    eps: float = option(1e-8, "epsilon of AdamW")
    weight_decay: float = option(
        0.03, "weight decay of AdamW; not applied to biases and 1-D tensors"
    )
    layer_decay: float = option(
        1.0,
        "layer-wise learning rate decay: the factor from an encoder layer to the one below; 1: off",
    )
    clip: float = option(0.0, "clip gradients to this norm; 0: off")
    ema: float = option(
        0.0,
        "decay of an exponential moving average (EMA) of the student's weights, which is exported"
        " and evaluated instead of them; 0: off",
    )

    def __post_init__(self) -> None:
        check_most(self, "optim.")
        check(self.batch_size > 0, "optim.batch_size", "positive", self.batch_size)
        check(self.epochs > 0, "optim.epochs", "positive", self.epochs)
        check(self.steps >= 0, "optim.steps", ">= 0", self.steps)
        check(self.lr > 0, "optim.lr", "positive", self.lr)
        check(self.lr_batch > 0, "optim.lr_batch", "positive", self.lr_batch)
        check(self.lr_end >= 0, "optim.lr_end", ">= 0", self.lr_end)
        check(self.warmup_epochs >= 0, "optim.warmup_epochs", ">= 0", self.warmup_epochs)
        for key in ("beta1", "beta2", "ema"):
            check(0 <= getattr(self, key) < 1, f"optim.{key}", "in [0, 1)", getattr(self, key))
        check(0 < self.layer_decay <= 1, "optim.layer_decay", "in (0, 1]", self.layer_decay)
        for key in ("eps", "weight_decay", "clip"):
            check(getattr(self, key) >= 0, f"optim.{key}", ">= 0", getattr(self, key))

    @property
    def peak(self) -> float:
        """The peak learning rate at this batch size."""
        growth = self.batch_size / self.lr_batch
        return self.lr * {"linear": growth, "sqrt": math.sqrt(growth), "none": 1.0}[self.lr_scaling]

    def step_count(self, images: int) -> int:
        """Optimiser steps of the run over `images` training images; ValueError for too many."""
        count = self.steps or max(1, round(self.epochs * images / self.batch_size))
        if count > STEPS:
            raise ValueError(
                f"optim.epochs {self.epochs} over {images} images makes {count:,} steps, more than"
                f" {STEPS:,}; lower it, or raise optim.batch_size"
            )
        return count

    def warmup_steps(self, images: int) -> int:
        """Optimiser steps of the warm-up; at most those of the run."""
        return min(round(self.warmup_epochs * images / self.batch_size), self.step_count(images))


@dataclass(frozen=True, kw_only=True)
class Run:
    """The training loop: logging, checkpoints, compilation, roll-backs and time limits."""

    log_every: int = option(10, "steps between log lines", machinery=True)
    track: tuple[str, ...] = option(
        (),
        "services that get the log too, comma-separated: wandb, mlflow (pip install -e '.[track]');"
        " a run that is resumed goes on in the same record",
        machinery=True,
    )
    save_minutes: float = option(
        15.0,
        "minutes between checkpoints, rounded up to a logged step; 0: off; a checkpoint is always"
        " saved after the last step",
        machinery=True,
        most=1e6,
    )
    save_every: int = option(
        0, "steps between checkpoints, besides those of run.save_minutes; 0: off", machinery=True
    )
    keep_last: int = option(
        2, "number of newest checkpoints to keep", machinery=True, most=1_000_000
    )
    keep_every: int = option(
        0,
        "save a checkpoint every so many steps and keep all of these; 0: off",
        machinery=True,
    )
    keep_best: int = option(
        0,
        "number of checkpoints that are best by run.best_by to keep; 0: off",
        machinery=True,
        most=1_000_000,
    )
    best_by: str = option(
        "loss",
        "value by which run.keep_best goes: loss (of the last log line), or probe/knn and other"
        " values of the log that --probe.every measures; a checkpoint is then saved after each"
        " probe",
        machinery=True,
    )
    compile: Literal["none", "student", "teachers", "all"] = option(
        "none",
        "models whose transformer blocks are compiled by torch.compile during training",
        machinery=True,
    )
    deterministic: bool = option(
        False,
        "use deterministic GPU kernels only, so that a run repeats and resumes bit for bit, as it"
        " does on a CPU; slower",
        machinery=True,
    )
    stop_at: int = option(
        0, "save and stop after this step; the run can be resumed; 0: off", machinery=True
    )
    extend: bool = option(
        False,
        "extend a finished or stopped run, in its --out or by --resume OLD, to more --optim.steps"
        " or --optim.epochs; schedules are computed for the new length",
        machinery=True,
    )
    stop_file: str = option(
        "",
        "save and stop as soon as this file exists, as with OUT/STOP; the run can be resumed",
        machinery=True,
    )
    spike: float = option(
        0.0,
        "skip a step whose loss exceeds the median of the last 64 by so many robust standard"
        " deviations; 0: off",
        machinery=True,
    )
    rollback_after: int = option(
        5,
        "after this many skipped steps in a row, roll back to the checkpoint before them and skip"
        " the samples that caused them",
        machinery=True,
        most=1_000_000,
    )
    max_rollbacks: int = option(
        3,
        "number of roll-backs after which the run aborts instead of rolling back again",
        machinery=True,
        most=1_000_000,
    )
    hang_timeout: float = option(
        120.0,
        "abort if a rank sends no heartbeat for this many seconds; 0: off",
        machinery=True,
        most=1e9,
    )
    stall_timeout: float = option(
        600.0,
        "abort if no rank makes progress for this many seconds (4x during setup, compilation,"
        " resume and save; 12x during evaluation and probes); 0: off",
        machinery=True,
        most=1e9,
    )

    def __post_init__(self) -> None:
        check_most(self, "run.")
        for name in self.track:
            check(name in SERVICES, "run.track", f"of {', '.join(SERVICES)}", name)
        check(len(set(self.track)) == len(self.track), "run.track", "distinct", self.track)
        for key in ("log_every", "keep_last", "rollback_after"):
            check(getattr(self, key) > 0, f"run.{key}", "positive", getattr(self, key))
        optional = ("save_minutes", "save_every", "stop_at", "keep_every", "keep_best", "spike")
        for key in (*optional, "max_rollbacks", "hang_timeout", "stall_timeout"):
            check(getattr(self, key) >= 0, f"run.{key}", ">= 0", getattr(self, key))

    def compiles(self, what: str) -> bool:
        """True if the blocks of `student` or `teachers` are compiled."""
        return self.compile in (what, "all")
