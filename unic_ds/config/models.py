"""The models of a run: frozen teachers, the student, and the ladder between them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from unic_ds.config import loss_terms
from unic_ds.config.objective import Loss
from unic_ds.config.option import check, check_checkpoint, check_rungs, option

TEACHER_NAME = re.compile(r"[a-z][a-z0-9_]*")
DIVIDED = "(images are divided by 255 before: divide a value of the scale 0 to 255 too)"
MOST_PIXELS = 16384  # side of an image
EIGHT_BITS = ("int8", "fp8", "int8_dynamic", "fp8_dynamic")


def check_range(value: int, name: str, least: int, most: int) -> None:
    """ValueError unless a number is one that a run could have."""
    check(least <= value <= most, name, f"from {least} to {most}", value)


def check_scale(mean: tuple[float, ...], std: tuple[float, ...], at: str) -> None:
    """ValueError unless channel means and stds are of images whose values are in [0, 1]."""
    check(all(0 <= m <= 1 for m in mean), f"{at}.mean", f"in [0, 1] {DIVIDED}", mean)
    check(all(0 < s <= 1 for s in std), f"{at}.std", f"in (0, 1] {DIVIDED}", std)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One frozen teacher: a row of a recipe's table."""

    name: str = option("", "word used in logs, state dicts and --teachers.NAME.key")
    source: str = option(
        "", "timm:NAME | open_clip:ARCH/TAG | file:PATH#arch=TIMM_NAME | python:MODULE:FUNCTION"
    )
    size: int = option(
        0, "image side in pixels; 0: the size whose grid is the student's (CNN: its own config)"
    )
    patch: int = option(0, "pixels a patch token covers; 0: the source's own")
    mean: tuple[float, ...] = option(
        (), "channel means of its preprocessing, in [0, 1]; empty: the source's own"
    )
    std: tuple[float, ...] = option(
        (), "channel stds of its preprocessing, in (0, 1]; empty: the source's own"
    )
    block: str = option(
        "output", "tokens are read here: output, middle (block), or after a 0-based block"
    )
    weight: float = option(1.0, "of its losses beside the other teachers'")
    cls_loss: str = option("", "distance of its CLS tokens, or none; empty: loss.cls")
    patch_loss: str = option("", "distance of its patch tokens, or none; empty: loss.patch")
    rungs: str = option("", "student blocks that learn it, as ladder.rungs; empty: ladder.rungs")
    precision: Literal["bf16", "fp32", "int8", "fp8", "int8_dynamic", "fp8_dynamic"] = option(
        "bf16",
        "of its forward; int8 and fp8 quantise the weights of its blocks' Linears, *_dynamic what"
        " they multiply too (docs/teachers.md)",
    )
    placement: Literal["replicate", "shard", "offload"] = option(
        "replicate",
        "its weights: whole on each rank, spread over a node's ranks, or so in their CPUs' memory",
        machinery=True,
    )
    micro: int = option(
        0, "images that it takes at once; 0: all of the student's micro batch", machinery=True
    )
    channels_last: bool = option(False, "NHWC memory format, faster for CNNs")

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
                loss_terms.parse(text, f"{at}.{kind}_loss", known=Loss.TERMS[kind])
        if self.rungs:
            check_rungs(self.rungs, f"{at}.rungs")
        check_range(self.size, f"{at}.size", 0, MOST_PIXELS)
        check_range(self.patch, f"{at}.patch", 0, 1024)
        check_range(self.micro, f"{at}.micro", 0, 1_000_000)
        whole = not self.quantised or self.placement == "replicate"
        check(whole, f"{at}.placement", f"replicate with {self.precision} weights", self.placement)
        plain = not self.channels_last or self.placement == "replicate"
        check(plain, f"{at}.placement", "replicate with channels_last", self.placement)
        for key in ("mean", "std"):
            value = getattr(self, key)
            check(len(value) in (0, 3), f"{at}.{key}", "three numbers (or empty)", value)
        check_scale(self.mean, self.std, at)

    @property
    def quantised(self) -> bool:
        """Whether weights of its blocks have eight bits."""
        return self.precision in EIGHT_BITS


@dataclass(frozen=True, kw_only=True)
class Student:
    """The encoder that is trained: any timm ViT."""

    model: str = option("vit_base_patch16_224", "timm name of a ViT")
    size: int = option(224, "image side in pixels")
    registers: int = option(-1, "register tokens; -1: the model's own")
    drop_path: float = option(0.1, "drop-path rate of the last block, linear from 0")
    mean: tuple[float, ...] = option(
        (0.485, 0.456, 0.406), "channel means of its preprocessing, in [0, 1]"
    )
    std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225), "channel stds of its preprocessing, in (0, 1]"
    )
    init: str = option(
        "",
        "start from a model folder (a run's student/, import-unic's) or a .safetensors encoder",
        machinery=True,  # the path may move; a checkpoint knows the SHA-256 of what it held
    )
    checkpoint: str = option(
        "none",
        "blocks that backward computes again instead of keeping what is inside: none, full, or"
        " every:K, each K-th",
        machinery=True,
    )

    def __post_init__(self) -> None:
        check_checkpoint(self.checkpoint, "student.checkpoint")
        check_range(self.size, "student.size", 1, MOST_PIXELS)
        check_range(self.registers, "student.registers", -1, 4096)
        check(0 <= self.drop_path < 1, "student.drop_path", "in [0, 1)", self.drop_path)
        check(len(self.mean) == 3, "student.mean", "three numbers", self.mean)
        check(len(self.std) == 3, "student.std", "three numbers", self.std)
        check_scale(self.mean, self.std, "student")


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The projectors from student blocks to teachers; thrown away after training."""

    rungs: str = option(
        "all",
        "blocks with projectors: all, half (every second), middle, last, or 0-based like 2,5,8,11",
    )
    width: int = option(0, "hidden width of a projector; 0: the student's width")
    last_width: int = option(0, "hidden width on the last block; 0: 4 x width")
    prenorm: bool = option(False, "LayerNorm before a projector")
    midnorm: bool = option(False, "LayerNorm between a projector's Linears")
    combine: Literal["sum", "each"] = option(
        "sum", "sum the rungs and take one loss, or average a loss per rung"
    )

    projector: Literal["mlp", "linear", "transformer"] = option(
        "mlp", "per rung: Linear-GELU-Linear, one Linear, or a transformer block on all tokens"
    )

    recompute: Literal["none", "hidden", "all"] = option(
        "hidden",
        "what backward computes again instead of keeping it: nothing, GELU (free where its GEMM"
        " does it on the side), or the first Linears too (+16% of the ladder's work)",
        machinery=True,
    )

    def __post_init__(self) -> None:
        check_rungs(self.rungs, "ladder.rungs")
        only = not self.midnorm or self.projector == "mlp"
        check(only, "ladder.midnorm", "false where ladder.projector is not mlp", self.midnorm)
        check_range(self.width, "ladder.width", 0, 1_000_000)
        check_range(self.last_width, "ladder.last_width", 0, 1_000_000)

    @property
    def one_op(self) -> bool:
        """Whether this is the ladder that `unic_kernels` has as one op."""
        plain = self.projector == "mlp" and not (self.prenorm or self.midnorm)
        return plain and self.combine == "sum"
