"""How long and how fast it learns; when it logs, saves, and what it measures at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unic_ds.config.option import check, check_most, option

STEPS = 9_999_999
"""The most steps of a run: names of checkpoints have seven digits."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its schedule and the length of the run."""

    batch_size: int = option(512, "images per optimiser step, over all ranks", most=1 << 24)
    epochs: float = option(200.0, "passes over the training images", most=1e6)
    steps: int = option(0, "optimiser steps; 0: as many as epochs says", most=STEPS)
    lr: float = option(3e-4, "peak learning rate at lr_batch")
    lr_batch: int = option(256, "batch size that lr is meant for", most=1 << 24)
    lr_scaling: Literal["linear", "sqrt", "none"] = option(
        "linear", "how the peak grows with batch_size / lr_batch"
    )
    lr_end: float = option(1e-6, "last value of the cosine")
    warmup_epochs: float = option(10.0, "epochs of linear warm-up from 0", most=1e6)
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.99, "AdamW")
    eps: float = option(1e-8, "AdamW")
    weight_decay: float = option(0.03, "AdamW; never on biases and 1-D tensors")
    layer_decay: float = option(
        1.0, "the rate of each encoder layer by that of the next above it; 1: the same for all"
    )
    clip: float = option(0.0, "largest gradient norm; 0: off")
    ema: float = option(
        0.0,
        "decay of an average of the student's weights, exported and evaluated in their place;"
        " 0: off",
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
        """Optimiser steps of the warm-up; never more than the run has."""
        return min(round(self.warmup_epochs * images / self.batch_size), self.step_count(images))


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The table after the last step: kNN and a linear probe on frozen features."""

    on: bool = option(
        True,
        "evaluate after training, where the images have at least two class folders",
        machinery=True,
    )
    k: int = option(10, "neighbours of the kNN", machinery=True, most=1_000_000)
    temperature: float = option(
        0.07, "softmax temperature of the neighbours' votes", machinery=True
    )
    max_train: int = option(50_000, "training images used by the probes", machinery=True)
    max_val: int = option(10_000, "validation images used by the probes", machinery=True)
    batch: int = option(64, "images per forward", machinery=True, most=1_000_000)

    def __post_init__(self) -> None:
        check_most(self, "eval.")
        for key in ("k", "temperature", "max_train", "max_val", "batch"):
            check(getattr(self, key) > 0, f"eval.{key}", "positive", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class Run:
    """Cadence of the loop, and what it does about trouble; a run may go on with others."""

    log_every: int = option(10, "steps between log lines", machinery=True)
    save_minutes: float = option(
        15.0,
        "minutes from one checkpoint to the next, which is saved at a log line; 0: off; the last"
        " step always saves",
        machinery=True,
        most=1e6,
    )
    save_every: int = option(0, "steps between checkpoints, too; 0: off", machinery=True)
    keep_last: int = option(2, "newest checkpoints kept", machinery=True, most=1_000_000)
    keep_every: int = option(
        0,
        "save and keep a checkpoint of each step that is a multiple of this; 0: off",
        machinery=True,
    )
    keep_best: int = option(
        0,
        "keep so many checkpoints of the lowest training loss; 0: off",
        machinery=True,
        most=1_000_000,
    )
    compile: Literal["none", "student", "teachers", "all"] = option(
        "none",
        "whose transformer blocks run through torch.compile while the student trains",
        machinery=True,
    )
    deterministic: bool = option(
        False,
        "run deterministic GPU kernels alone, so that a run repeats itself and resumes bit for bit,"
        " as it does on a CPU; slower",
        machinery=True,
    )
    stop_at: int = option(
        0, "save and stop after this step, to be resumed; 0: at the end", machinery=True
    )
    extend: bool = option(
        False,
        "train a run further than it was started for: --optim.steps or --optim.epochs may be more,"
        " in its --out or from --resume OLD; the schedules are those of the new length",
        machinery=True,
    )
    stop_file: str = option(
        "",
        "save and stop, to be resumed, when this file is there, as for OUT/STOP",
        machinery=True,
    )
    spike: float = option(
        0.0,
        "skip a step whose loss lies this many robust deviations above the last 64; 0: off",
        machinery=True,
    )
    rollback_after: int = option(
        5,
        "skipped steps in a row after which it goes back to the checkpoint before them, and on past"
        " their samples",
        machinery=True,
        most=1_000_000,
    )
    max_rollbacks: int = option(
        3,
        "how often a run may go back; where it would again, it stops",
        machinery=True,
        most=1_000_000,
    )
    hang_timeout: float = option(
        120.0,
        "seconds without a sign of life after which a rank counts as dead and the run ends; 0: off",
        machinery=True,
        most=1e9,
    )
    stall_timeout: float = option(
        600.0,
        "seconds in which no rank gets on after which the run ends (four times as many while it"
        " builds, resumes, compiles or saves, twelve while it evaluates); 0: off",
        machinery=True,
        most=1e9,
    )

    def __post_init__(self) -> None:
        check_most(self, "run.")
        for key in ("log_every", "keep_last", "rollback_after"):
            check(getattr(self, key) > 0, f"run.{key}", "positive", getattr(self, key))
        optional = ("save_minutes", "save_every", "stop_at", "keep_every", "keep_best", "spike")
        for key in (*optional, "max_rollbacks", "hang_timeout", "stall_timeout"):
            check(getattr(self, key) >= 0, f"run.{key}", ">= 0", getattr(self, key))

    def compiles(self, what: str) -> bool:
        """Whether the blocks of `student` or `teachers` are compiled."""
        return self.compile in (what, "all")
