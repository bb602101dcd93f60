"""Options of the objective: loss terms, balance of teachers, standardisation of targets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unic_ds.config import loss_terms
from unic_ds.config.option import check, check_most, option

BALANCERS = ("dropping", "none", "fixed", "adaloss", "famo", "mgda")
"""The built-in balancers."""

MGDA_TEACHERS = 12
"""The most teachers of `mgda`, which solves every subset of them."""

BALANCER = re.compile(r"[a-z][a-z0-9_]*")


class Distance(NamedTuple):
    """Loss of a teacher's two kinds of token, each as term -> weight; empty: not learned."""

    cls: dict[str, float]
    patch: dict[str, float]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of token that are learned."""
        return tuple(kind for kind, terms in zip(self._fields, self, strict=True) if terms)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Loss between a prediction and its target (method: section 3)."""

    cls: str = option(
        "0.5 cosine + 0.5 smooth_l1",
        "loss of CLS tokens: a weighted sum of cosine, smooth_l1, mse, contrastive, dispersion and"
        " relational, or none",
    )
    patch: str = option(
        "0.5 cosine + 0.5 smooth_l1",
        "loss of patch tokens: a weighted sum of cosine, smooth_l1 and mse, or none",
    )
    tokens: str = option(
        "",
        "kind of token that alone is distilled on the images of some sources of data.train:"
        " NAME=patch or NAME=cls, comma-separated, each named by the end of its path; empty: both",
    )
    temperature: float = option(0.07, "temperature of the contrastive term")
    shift: int = option(
        0,
        "shift-equivariant patch loss: teachers and student see parts of an image that are shifted"
        " by up to this many patches, drawn for each step, and patch tokens of the common part are"
        " compared; 0: off",
    )
    divisor: Literal["expected", "kept"] = option(
        "expected",
        "divide the loss by the expected number of kept (teacher, image) pairs, or by their number"
        " in each micro batch",
    )

    def __post_init__(self) -> None:
        loss_terms.parse(self.cls, "loss.cls", cls=True)
        loss_terms.parse(self.patch, "loss.patch", cls=False)
        for part in _parts(self.tokens):
            name, _, kind = part.rpartition("=")
            valid = bool(name.strip()) and kind.strip() in Distance._fields
            check(valid, "loss.tokens", "SOURCE=patch or SOURCE=cls, comma-separated", self.tokens)
        twice = len(self.kind_of_source) < len(_parts(self.tokens))
        check(not twice, "loss.tokens", "one kind of token for each source", self.tokens)
        check(self.temperature > 0, "loss.temperature", "positive", self.temperature)
        check(0 <= self.shift <= 64, "loss.shift", "from 0 to 64", self.shift)

    @property
    def kind_of_source(self) -> dict[str, str]:
        """The kind of token that alone has a loss, by the names in `tokens`."""
        pairs = [part.rpartition("=") for part in _parts(self.tokens)]
        return {name.strip(): kind.strip() for name, _, kind in pairs}

    @property
    def distance(self) -> Distance:
        """Loss terms of every teacher that does not have its own."""
        return Distance(
            cls=loss_terms.parse(self.cls, "loss.cls", cls=True),
            patch=loss_terms.parse(self.patch, "loss.patch", cls=False),
        )


def _parts(text: str) -> list[str]:
    """The texts between commas, without those that are empty."""
    return [part for part in map(str.strip, text.split(",")) if part]


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Weight of each teacher's loss on each image."""

    kind: str = option(
        "dropping",
        "dropping: drop teachers at random; none: all equal; fixed: by teachers.NAME.weight;"
        " adaloss: by the inverse of their running losses; famo: so that all losses fall at one"
        " rate; mgda: so that no teacher's loss rises (not under ZeRO-3)",
        choices=BALANCERS,
    )
    momentum: float = option(
        0.99,
        "adaloss, mgda, lazy dropping: momentum of the running losses, or of the gradients' inner"
        " products",
    )
    rate: float = option(0.025, "famo: learning rate of the teachers' logits")
    decay: float = option(0.01, "famo: weight decay of the logits, towards equal weights")

    def __post_init__(self) -> None:
        check(bool(BALANCER.fullmatch(self.kind)), "balance.kind", "a name", self.kind)
        check(0 <= self.momentum < 1, "balance.momentum", "in [0, 1)", self.momentum)
        check(self.rate > 0, "balance.rate", "positive", self.rate)
        check(self.decay >= 0, "balance.decay", ">= 0", self.decay)

    @property
    def compares_gradients(self) -> bool:
        """True if the ladder runs backward once for each teacher, which ZeRO-3 cannot do."""
        return self.kind == "mgda"


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Teacher dropping: the teachers whose loss counts for an image."""

    rate: float = option(
        0.5, "probability of dropping each teacher but the one with the largest loss on an image"
    )
    unit: Literal["image", "step"] = option(
        "image",
        "draw a mask per image, or one per step (which keeps the largest loss of a micro batch)",
    )
    keep_hardest: bool = option(True, "never drop the teacher with the largest loss")
    lazy: bool = option(
        False,
        "draw the kept pairs before the teachers run, and run each teacher on its images alone;"
        " the hardest is then the teacher with the largest running loss",
    )
    full_every: int = option(
        20,
        "lazy: run all teachers on all images every so many steps, and choose the hardest anew",
        most=1_000_000,
    )

    def __post_init__(self) -> None:
        check_most(self, "drop.")
        check(0 <= self.rate <= 1, "drop.rate", "in [0, 1]", self.rate)
        check(
            self.keep_hardest or self.rate < 1,
            "drop.rate",
            "< 1 if drop.keep_hardest is false",
            self.rate,
        )
        check(self.full_every > 0, "drop.full_every", "positive", self.full_every)

    def kept_share(self, teachers: int) -> float:
        """Expected fraction of (teacher, image) pairs that are kept."""
        certain = 1 if self.keep_hardest else 0
        return (certain + (teachers - certain) * (1 - self.rate)) / teachers

    def computed_share(self, teachers: int) -> float:
        """Expected fraction of (teacher, image) pairs whose features are computed."""
        if not self.lazy:
            return 1.0
        kept = self.kept_share(teachers)
        return kept + (1 - kept) / self.full_every


@dataclass(frozen=True, kw_only=True)
class Standardise:
    """Standardisation of the targets by running or fitted statistics (method: section 1)."""

    on: bool = option(True, "standardise the teachers' features")
    kind: Literal["channel", "phi_s"] = option(
        "channel",
        "channel: by the mean and std of each channel; phi_s: PHI-S, a rotation and one scale by"
        " which every channel has variance 1 (needs fit_steps)",
    )
    fit_steps: int = option(
        0,
        "fit the statistics on this many batches before training and keep them fixed; 0: update"
        " running statistics during training",
        most=1_000_000,
    )
    momentum_end: float = option(
        0.001, "last value of the running statistics' momentum, which falls from 1 by a cosine"
    )
    std_floor: float = option(
        0.1,
        "kind channel: smallest std, as a fraction of the teacher's median channel std; 0: off",
    )
    target_clamp: float = option(10.0, "clamp targets to this absolute value; 0: off")
    freeze_after: int = option(0, "stop updating the statistics after this step; 0: never")

    def __post_init__(self) -> None:
        check_most(self, "standardise.")
        check(
            0 <= self.momentum_end <= 1, "standardise.momentum_end", "in [0, 1]", self.momentum_end
        )
        for key in ("fit_steps", "std_floor", "target_clamp", "freeze_after"):
            check(getattr(self, key) >= 0, f"standardise.{key}", ">= 0", getattr(self, key))
        check(
            self.kind == "channel" or self.fit_steps > 0,
            "standardise.fit_steps",
            f"positive for --standardise.kind {self.kind} (say 100)",
            self.fit_steps,
        )
        check(
            not (self.fit_steps and self.freeze_after),
            "standardise.freeze_after",
            "0 if standardise.fit_steps fixes the statistics before training",
            self.freeze_after,
        )

    @property
    def fitted(self) -> bool:
        """True if the statistics are fitted before training and then fixed."""
        return self.on and self.fit_steps > 0

    @property
    def running(self) -> bool:
        """True if the statistics are updated during training."""
        return self.on and self.fit_steps == 0
