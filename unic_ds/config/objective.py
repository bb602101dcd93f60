"""What is minimised: distances, the balance of teachers, the targets' standardisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from unic_ds.config import loss_terms
from unic_ds.config.option import check, check_most, option


class Distance(NamedTuple):
    """What a teacher's two kinds of token are judged by: term -> weight; empty: not learned."""

    cls: dict[str, float]
    patch: dict[str, float]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of token that are learned."""
        return tuple(kind for kind, terms in zip(self._fields, self, strict=True) if terms)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Distance between a prediction and its target (method: section 3)."""

    TERMS: ClassVar = {"cls": loss_terms.TERMS, "patch": ("cosine", "smooth_l1", "mse")}

    cls: str = option(
        "0.5 cosine + 0.5 smooth_l1",
        "of CLS tokens: weighted cosine, smooth_l1, mse, contrastive; none: not learned",
    )
    patch: str = option(
        "0.5 cosine + 0.5 smooth_l1",
        "of patch tokens: weighted cosine, smooth_l1, mse; none: not learned",
    )
    temperature: float = option(0.07, "of the contrastive term")
    divisor: Literal["expected", "kept"] = option(
        "expected", "divide by the expected number of kept pairs, or count them per micro batch"
    )

    def __post_init__(self) -> None:
        assert self.distance
        check(self.temperature > 0, "loss.temperature", "positive", self.temperature)

    @property
    def distance(self) -> Distance:
        """What every teacher is judged by that does not say otherwise."""
        return Distance(
            *(
                loss_terms.parse(getattr(self, k), f"loss.{k}", known=self.TERMS[k])
                for k in self.TERMS
            )
        )


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How much each teacher counts for each image."""

    kind: Literal["dropping", "none", "fixed", "adaloss"] = option(
        "dropping", "drop teachers by chance, all equal, by their weights, or by inverse loss"
    )
    momentum: float = option(0.99, "adaloss: what stays of the running losses at each step")

    def __post_init__(self) -> None:
        check(0 <= self.momentum < 1, "balance.momentum", "in [0, 1)", self.momentum)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Teacher dropping: which teachers an image learns from."""

    rate: float = option(0.5, "chance of dropping each teacher but an image's hardest")
    unit: Literal["image", "step"] = option(
        "image", "one mask per image, or one for the step (hardest: of a micro batch)"
    )
    keep_hardest: bool = option(True, "never drop the teacher with the largest loss")

    def __post_init__(self) -> None:
        check(0 <= self.rate <= 1, "drop.rate", "in [0, 1]", self.rate)
        check(
            self.keep_hardest or self.rate < 1,
            "drop.rate",
            "< 1 where drop.keep_hardest is off",
            self.rate,
        )


@dataclass(frozen=True, kw_only=True)
class Standardise:
    """Standardisation of the targets, by running statistics or fitted ones (method: section 1)."""

    on: bool = option(True, "standardise teacher features")
    kind: Literal["channel", "phi_s"] = option(
        "channel",
        "channel: each by its own mean and std; phi_s: PHI-S, one rotation and one scale that give"
        " every channel variance 1 (needs fit_steps)",
    )
    fit_steps: int = option(
        0,
        "fit the statistics to this many batches before training and keep them fixed; 0: running"
        " statistics",
        most=1_000_000,
    )
    momentum_end: float = option(0.001, "last value of the cosine from 1")
    std_floor: float = option(
        0.1, "smallest std, as a share of the teacher's median channel std; 0: off (kind channel)"
    )
    target_clamp: float = option(10.0, "largest absolute target; 0: off")
    freeze_after: int = option(0, "fix the statistics after this step; 0: never")

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
            "0 where standardise.fit_steps fixes the statistics before training",
            self.freeze_after,
        )

    @property
    def fitted(self) -> bool:
        """Whether the statistics are fitted before training and fixed then."""
        return self.on and self.fit_steps > 0

    @property
    def running(self) -> bool:
        """Whether the statistics follow the training batches."""
        return self.on and self.fit_steps == 0
