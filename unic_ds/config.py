"""The science of a run as frozen values that cannot be wrong.

Stdlib only: options are checked before torch is imported, so a typo answers at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

from unic_ds import formula

TEACHER_NAME = re.compile(r"[a-z][a-z0-9_]*")


def knob(default: Any, text: str, *, machinery: bool = False) -> Any:
    """A field with its help line; `machinery` marks what may differ when a run is resumed."""
    return field(default=default, metadata={"help": text, "machinery": machinery})


def check(holds: bool, name: str, want: str, value: object) -> None:
    """Raise ValueError naming the option, what it wants and what it got."""
    if not holds:
        raise ValueError(f"{name} must be {want}, got {value!r}")


def check_checkpoint(text: str, name: str) -> None:
    """Raise ValueError unless `text` says which blocks are recomputed."""
    known = text in ("none", "full") or re.fullmatch(r"every:[1-9]\d*", text)
    check(bool(known), name, "none, full or every:K as in every:2", text)


def check_rungs(text: str, name: str) -> None:
    """Raise ValueError unless `text` names student blocks."""
    known = text in ("all", "half", "middle", "last") or re.fullmatch(r"\d+(,\d+)*", text)
    check(bool(known), name, "all, half, middle, last or block numbers like 2,5,8,11", text)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One frozen teacher: a row of a recipe's table."""

    name: str = knob("", "word used in logs, state dicts and --teachers.NAME.key")
    source: str = knob(
        "", "timm:NAME | open_clip:ARCH/TAG | file:PATH#arch=TIMM_NAME | python:MODULE:FUNCTION"
    )
    size: int = knob(
        0, "image side in pixels; 0: the size whose grid is the student's (CNN: its own config)"
    )
    patch: int = knob(0, "pixels a patch token covers; 0: the source's own")
    mean: tuple[float, ...] = knob(
        (), "channel means of its preprocessing; empty: the source's own"
    )
    std: tuple[float, ...] = knob((), "channel stds of its preprocessing; empty: the source's own")
    block: str = knob(
        "output", "tokens are read here: output, middle (block), or after a 0-based block"
    )
    weight: float = knob(1.0, "of its losses beside the other teachers'")
    cls_loss: str = knob("", "distance of its CLS tokens, or none; empty: loss.cls")
    patch_loss: str = knob("", "distance of its patch tokens, or none; empty: loss.patch")
    rungs: str = knob("", "student blocks that learn it, as ladder.rungs; empty: ladder.rungs")
    precision: Literal["bf16", "fp32"] = knob("bf16", "weights and activations of its forward")
    channels_last: bool = knob(False, "NHWC memory format, faster for CNNs")

    def __post_init__(self) -> None:
        at = f"teachers.{self.name}"
        check(
            bool(TEACHER_NAME.fullmatch(self.name)),
            "a teacher's name",
            "letters, digits and _ (a-z first)",
            self.name,
        )
        kind, _, rest = self.source.partition(":")
        known = kind in ("timm", "open_clip", "file", "python") and rest != ""
        check(known, f"{at}.source", "timm:, open_clip:, file: or python: and a name", self.source)
        if kind == "file":
            check("#arch=" in rest, f"{at}.source", "file:PATH#arch=TIMM_NAME", self.source)
        if kind == "python":
            check(rest.count(":") == 1, f"{at}.source", "python:MODULE:FUNCTION", self.source)
        if kind == "open_clip":
            check("/" in rest, f"{at}.source", "open_clip:ARCH/TAG", self.source)
        check(self.name != "pixels", "a teacher's name", "another than the baseline's", self.name)
        at_block = self.block in ("output", "middle") or self.block.isdecimal()
        check(at_block, f"{at}.block", "output, middle or a 0-based block number", self.block)
        check(self.weight > 0, f"{at}.weight", "positive", self.weight)
        for kind, text in (("cls", self.cls_loss), ("patch", self.patch_loss)):
            if text:
                formula.parse(text, f"{at}.{kind}_loss", known=Loss.TERMS[kind])
        if self.rungs:
            check_rungs(self.rungs, f"{at}.rungs")
        check(self.size >= 0, f"{at}.size", ">= 0", self.size)
        check(self.patch >= 0, f"{at}.patch", ">= 0", self.patch)
        for key in ("mean", "std"):
            value = getattr(self, key)
            check(len(value) in (0, 3), f"{at}.{key}", "three numbers (or empty)", value)
        check(all(s > 0 for s in self.std), f"{at}.std", "positive", self.std)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images are, how they are augmented and decoded."""

    train: str = knob(
        "",
        "images: a folder (class folders optional), a folder of .tar shards, a .txt list of paths,"
        " or several: a,b=0.5 shows half of b in an epoch",
        machinery=True,
    )
    val: str = knob(
        "", "images to evaluate on, named likewise; empty: val_share of train", machinery=True
    )
    window: int = knob(8, "shards whose samples are shuffled together")
    val_share: float = knob(0.0, "share of train held out, by a seeded hash of the sample's name")
    augment: Literal["unic", "weak", "none"] = knob(
        "unic", "draws: unic (all), weak (crop + flip), none (centre)"
    )
    crop_min: float = knob(0.08, "smallest crop, as a share of the image's area")
    ratio_max: float = knob(4 / 3, "a crop's largest aspect ratio; the smallest is its inverse")
    flip: float = knob(0.5, "chance of a horizontal flip")
    jitter: float = knob(0.8, "chance of colour jitter")
    brightness: float = knob(0.4, "jitter: factor in 1 -/+ this")
    contrast: float = knob(0.4, "jitter: factor in 1 -/+ this")
    saturation: float = knob(0.2, "jitter: factor in 1 -/+ this")
    hue: float = knob(0.1, "jitter: turn of the colour circle in -/+ this")
    grey: float = knob(0.2, "chance of turning grey")
    blur: float = knob(0.2, "chance of Gaussian blur")
    blur_min: float = knob(0.1, "smallest blur sigma, in student pixels")
    blur_max: float = knob(5.0, "largest blur sigma, in student pixels")
    solarise: float = knob(0.2, "chance of inverting what is brighter than half")
    backend: Literal["auto", "dali", "torch"] = knob(
        "auto", "decoder: DALI, its torch twin, or what is there", machinery=True
    )
    threads: int = knob(
        0, "decoding threads per rank; 0: the rank's share of the cores", machinery=True
    )
    prefetch: int = knob(2, "batches decoded ahead", machinery=True)
    bad_limit: float = knob(
        0.01, "stop when more than this share of the images cannot be read", machinery=True
    )
    max_megapixels: float = knob(50.0, "a larger image counts as unreadable (decompression bombs)")

    def __post_init__(self) -> None:
        for key in ("flip", "jitter", "grey", "blur", "solarise", "bad_limit"):
            value = getattr(self, key)
            check(0 <= value <= 1, f"data.{key}", "in [0, 1]", value)
        check(0 <= self.val_share < 1, "data.val_share", "in [0, 1)", self.val_share)
        check(self.window > 0, "data.window", "positive", self.window)
        check(0 < self.crop_min <= 1, "data.crop_min", "in (0, 1]", self.crop_min)
        check(self.ratio_max >= 1, "data.ratio_max", ">= 1", self.ratio_max)
        for key in ("brightness", "contrast", "saturation"):
            value = getattr(self, key)
            check(0 <= value <= 1, f"data.{key}", "in [0, 1]", value)
        check(0 <= self.hue <= 0.5, "data.hue", "in [0, 0.5]", self.hue)
        check(
            0 < self.blur_min <= self.blur_max, "data.blur_min", "in (0, blur_max]", self.blur_min
        )
        check(self.threads >= 0, "data.threads", ">= 0", self.threads)
        check(self.prefetch >= 1, "data.prefetch", ">= 1", self.prefetch)
        check(self.max_megapixels > 0, "data.max_megapixels", "positive", self.max_megapixels)


@dataclass(frozen=True, kw_only=True)
class Student:
    """The encoder that is trained: any timm ViT."""

    model: str = knob("vit_base_patch16_224", "timm name of a ViT")
    size: int = knob(224, "image side in pixels")
    registers: int = knob(-1, "register tokens; -1: the model's own")
    drop_path: float = knob(0.1, "drop-path rate of the last block, linear from 0")
    mean: tuple[float, ...] = knob((0.485, 0.456, 0.406), "channel means of its preprocessing")
    std: tuple[float, ...] = knob((0.229, 0.224, 0.225), "channel stds of its preprocessing")
    init: str = knob(
        "",
        "start from a model folder (a run's student/, import-unic's) or a .safetensors encoder",
        machinery=True,  # the path may move; a checkpoint knows the SHA-256 of what it held
    )
    checkpoint: str = knob(
        "none",
        "blocks that backward computes again instead of keeping what is inside: none, full, or"
        " every:K, each K-th",
        machinery=True,
    )

    def __post_init__(self) -> None:
        check_checkpoint(self.checkpoint, "student.checkpoint")
        check(self.size > 0, "student.size", "positive", self.size)
        check(self.registers >= -1, "student.registers", ">= -1", self.registers)
        check(0 <= self.drop_path < 1, "student.drop_path", "in [0, 1)", self.drop_path)
        check(len(self.mean) == 3, "student.mean", "three numbers", self.mean)
        check(
            len(self.std) == 3 and min(self.std) > 0,
            "student.std",
            "three positive numbers",
            self.std,
        )


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The projectors from student blocks to teachers; thrown away after training."""

    rungs: str = knob(
        "all",
        "blocks with projectors: all, half (every second), middle, last, or 0-based like 2,5,8,11",
    )
    width: int = knob(0, "hidden width of a projector; 0: the student's width")
    last_width: int = knob(0, "hidden width on the last block; 0: 4 x width")
    prenorm: bool = knob(False, "LayerNorm before a projector")
    midnorm: bool = knob(False, "LayerNorm between a projector's Linears")
    combine: Literal["sum", "each"] = knob(
        "sum", "sum the rungs and take one loss, or average a loss per rung"
    )

    projector: Literal["mlp", "linear", "transformer"] = knob(
        "mlp", "per rung: Linear-GELU-Linear, one Linear, or a transformer block on all tokens"
    )

    recompute: Literal["none", "hidden", "all"] = knob(
        "hidden",
        "what backward computes again instead of keeping it: nothing, GELU (free where its GEMM"
        " does it on the side), or the first Linears too (+16% of the ladder's work)",
        machinery=True,
    )

    def __post_init__(self) -> None:
        check_rungs(self.rungs, "ladder.rungs")
        only = not self.midnorm or self.projector == "mlp"
        check(only, "ladder.midnorm", "false where ladder.projector is not mlp", self.midnorm)
        check(self.width >= 0, "ladder.width", ">= 0", self.width)
        check(self.last_width >= 0, "ladder.last_width", ">= 0", self.last_width)

    @property
    def one_op(self) -> bool:
        """Whether this is the ladder that `unic_kernels` has as one op."""
        plain = self.projector == "mlp" and not (self.prenorm or self.midnorm)
        return plain and self.combine == "sum"


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

    TERMS: ClassVar = {"cls": formula.TERMS, "patch": ("cosine", "smooth_l1", "mse")}

    cls: str = knob(
        "0.5 cosine + 0.5 smooth_l1",
        "of CLS tokens: weighted cosine, smooth_l1, mse, contrastive; none: not learned",
    )
    patch: str = knob(
        "0.5 cosine + 0.5 smooth_l1",
        "of patch tokens: weighted cosine, smooth_l1, mse; none: not learned",
    )
    temperature: float = knob(0.07, "of the contrastive term")
    divisor: Literal["expected", "kept"] = knob(
        "expected", "divide by the expected number of kept pairs, or count them per micro batch"
    )

    def __post_init__(self) -> None:
        assert self.distance
        check(self.temperature > 0, "loss.temperature", "positive", self.temperature)

    @property
    def distance(self) -> Distance:
        """What every teacher is judged by that does not say otherwise."""
        return Distance(
            *(formula.parse(getattr(self, k), f"loss.{k}", known=self.TERMS[k]) for k in self.TERMS)
        )


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How much each teacher counts for each image."""

    kind: Literal["dropping", "none", "fixed", "adaloss"] = knob(
        "dropping", "drop teachers by chance, all equal, by their weights, or by inverse loss"
    )
    momentum: float = knob(0.99, "adaloss: what stays of the running losses at each step")

    def __post_init__(self) -> None:
        check(0 <= self.momentum < 1, "balance.momentum", "in [0, 1)", self.momentum)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Teacher dropping: which teachers an image learns from."""

    rate: float = knob(0.5, "chance of dropping each teacher but an image's hardest")
    unit: Literal["image", "step"] = knob(
        "image", "one mask per image, or one for the step (hardest: of a micro batch)"
    )
    keep_hardest: bool = knob(True, "never drop the teacher with the largest loss")

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

    on: bool = knob(True, "standardise teacher features")
    kind: Literal["channel", "phi_s"] = knob(
        "channel",
        "channel: each by its own mean and std; phi_s: PHI-S, one rotation and one scale that give"
        " every channel variance 1 (needs fit_steps)",
    )
    fit_steps: int = knob(
        0,
        "fit the statistics to this many batches before training and keep them fixed; 0: running"
        " statistics",
    )
    momentum_end: float = knob(0.001, "last value of the cosine from 1")
    std_floor: float = knob(
        0.1, "smallest std, as a share of the teacher's median channel std; 0: off (kind channel)"
    )
    target_clamp: float = knob(10.0, "largest absolute target; 0: off")
    freeze_after: int = knob(0, "fix the statistics after this step; 0: never")

    def __post_init__(self) -> None:
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


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its schedule and the length of the run."""

    batch_size: int = knob(512, "images per optimiser step, over all ranks")
    epochs: float = knob(200.0, "passes over the training images")
    steps: int = knob(0, "optimiser steps; 0: as many as epochs says")
    lr: float = knob(3e-4, "peak learning rate at lr_batch")
    lr_batch: int = knob(256, "batch size that lr is meant for")
    lr_scaling: Literal["linear", "sqrt", "none"] = knob(
        "linear", "how the peak grows with batch_size / lr_batch"
    )
    lr_end: float = knob(1e-6, "last value of the cosine")
    warmup_epochs: float = knob(10.0, "epochs of linear warm-up from 0")
    beta1: float = knob(0.9, "AdamW")
    beta2: float = knob(0.99, "AdamW")
    eps: float = knob(1e-8, "AdamW")
    weight_decay: float = knob(0.03, "AdamW; never on biases and 1-D tensors")
    clip: float = knob(0.0, "largest gradient norm; 0: off")
    ema: float = knob(
        0.0,
        "decay of an average of the student's weights, exported and evaluated in their place;"
        " 0: off",
    )

    def __post_init__(self) -> None:
        check(self.batch_size > 0, "optim.batch_size", "positive", self.batch_size)
        check(self.epochs > 0, "optim.epochs", "positive", self.epochs)
        check(self.steps >= 0, "optim.steps", ">= 0", self.steps)
        check(self.lr > 0, "optim.lr", "positive", self.lr)
        check(self.lr_batch > 0, "optim.lr_batch", "positive", self.lr_batch)
        check(self.lr_end >= 0, "optim.lr_end", ">= 0", self.lr_end)
        check(self.warmup_epochs >= 0, "optim.warmup_epochs", ">= 0", self.warmup_epochs)
        for key in ("beta1", "beta2", "ema"):
            check(0 <= getattr(self, key) < 1, f"optim.{key}", "in [0, 1)", getattr(self, key))
        for key in ("eps", "weight_decay", "clip"):
            check(getattr(self, key) >= 0, f"optim.{key}", ">= 0", getattr(self, key))

    @property
    def peak(self) -> float:
        """The peak learning rate at this batch size."""
        growth = self.batch_size / self.lr_batch
        return self.lr * {"linear": growth, "sqrt": math.sqrt(growth), "none": 1.0}[self.lr_scaling]

    def step_count(self, images: int) -> int:
        """Optimiser steps of the run over `images` training images."""
        return self.steps or max(1, round(self.epochs * images / self.batch_size))

    def warmup_steps(self, images: int) -> int:
        """Optimiser steps of the warm-up; never more than the run has."""
        return min(round(self.warmup_epochs * images / self.batch_size), self.step_count(images))


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The table after the last step: kNN and a linear probe on frozen features."""

    on: bool = knob(
        True,
        "evaluate after training, where the images have at least two class folders",
        machinery=True,
    )
    k: int = knob(10, "neighbours of the kNN", machinery=True)
    temperature: float = knob(0.07, "softmax temperature of the neighbours' votes", machinery=True)
    max_train: int = knob(50_000, "training images used by the probes", machinery=True)
    max_val: int = knob(10_000, "validation images used by the probes", machinery=True)
    batch: int = knob(64, "images per forward", machinery=True)

    def __post_init__(self) -> None:
        for key in ("k", "temperature", "max_train", "max_val", "batch"):
            check(getattr(self, key) > 0, f"eval.{key}", "positive", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class Run:
    """Cadence of the loop; none of it changes what is learned."""

    log_every: int = knob(10, "steps between log lines", machinery=True)
    save_every: int = knob(
        1000, "steps between checkpoints; the last step always saves", machinery=True
    )
    keep_last: int = knob(2, "checkpoints kept", machinery=True)
    stop_at: int = knob(
        0, "save and stop after this step, to be resumed; 0: at the end", machinery=True
    )

    def __post_init__(self) -> None:
        for key in ("log_every", "save_every", "keep_last"):
            check(getattr(self, key) > 0, f"run.{key}", "positive", getattr(self, key))
        check(self.stop_at >= 0, "run.stop_at", ">= 0", self.stop_at)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a run learns."""

    recipe: str = knob("", "name of the recipe this came from", machinery=True)
    seed: int = knob(0, "of order, augmentation, drops and initial weights")
    precision: Literal["", "bf16", "fp32"] = knob(
        "", "of the student; empty: what the ds_config says"
    )
    kernels: Literal["fused", "reference"] = knob(
        "fused",
        "ladder, loss and statistics: by kernels (Triton on a GPU), or in plain torch to debug",
        machinery=True,
    )
    teachers: tuple[Teacher, ...] = knob((), "comma-separated SOURCE or NAME=SOURCE")
    stages: str = knob(
        "",
        "earlier stages, each as what differs from this run, in OUT/stage1 and so on; separated by"
        " ; as in 'student.size=224 optim.epochs=200'; each starts from the student before it",
    )
    cache: str = knob(
        "",
        "folder that `unic-ds cache` made: teachers in it are not run, and its views are shown",
        machinery=True,  # the path may move; a checkpoint knows what it held
    )
    data: Data = Data()
    student: Student = Student()
    ladder: Ladder = Ladder()
    loss: Loss = Loss()
    balance: Balance = Balance()
    drop: Drop = Drop()
    standardise: Standardise = Standardise()
    optim: Optim = Optim()
    eval: Eval = Eval()
    run: Run = Run()

    def __post_init__(self) -> None:
        check(self.seed >= 0, "seed", ">= 0", self.seed)
        names = [t.name for t in self.teachers]
        check(
            len(set(names)) == len(names),
            "teachers' names",
            "different (write NAME=SOURCE)",
            ",".join(names),
        )
        where = self.data.val or self.data.val_share
        check(
            not (self.data.val and self.data.val_share),
            "data.val and data.val_share",
            "not both set",
            where,
        )
        for row in self.teachers:
            check(any(self.distance(row)), f"teachers.{row.name}'s losses", "not both none", "none")
            weighs = row.weight == 1 or self.balance.kind != "none"
            check(weighs, f"teachers.{row.name}.weight", "1 where balance.kind is none", row.weight)

    def distance(self, row: Teacher) -> Distance:
        """What that teacher is judged by."""
        cls, patch = row.cls_loss or self.loss.cls, row.patch_loss or self.loss.patch
        return replace(self.loss, cls=cls, patch=patch).distance

    @property
    def distances(self) -> dict[str, Distance]:
        """What each teacher is judged by."""
        return {row.name: self.distance(row) for row in self.teachers}
