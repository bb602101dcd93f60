"""Options of the models: frozen teachers, the student, and the ladder of projectors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from unic_ds.config import loss_terms
from unic_ds.config.block_choice import ActivationCheckpointing, RungChoice
from unic_ds.config.option import MOST_PIXELS, check, option
from unic_ds.config.teacher_source import TeacherSource

TEACHER_NAME = re.compile(r"[a-z][a-z0-9_]*")
DIVIDED = "(images are divided by 255, so divide values of the scale 0 to 255 too)"
EIGHT_BITS = ("int8", "fp8", "int8_dynamic", "fp8_dynamic")


def check_range(value: int, name: str, least: int, most: int) -> None:
    """Raise ValueError unless a number is from `least` to `most`."""
    check(least <= value <= most, name, f"from {least} to {most}", value)


def check_scale(mean: tuple[float, ...], std: tuple[float, ...], at: str) -> None:
    """Raise ValueError unless channel means and stds are of images with values in [0, 1]."""
    check(all(0 <= m <= 1 for m in mean), f"{at}.mean", f"in [0, 1] {DIVIDED}", mean)
    check(all(0 < s <= 1 for s in std), f"{at}.std", f"in (0, 1] {DIVIDED}", std)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One frozen teacher: a row of a recipe's table."""

    name: str = option("", "the teacher's name in logs, state dicts and --teachers.NAME.KEY")
    source: str = option(
        "",
        "where its weights are: timm:NAME | open_clip:ARCH/TAG | file:PATH#arch=TIMM_NAME |"
        " run:PATH (of a finished run) | python:MODULE:FUNCTION",
    )
    size: int = option(
        0,
        "image size in pixels; 0: by `resize` (a CNN, and models that take one size alone: their"
        " pretrained input size)",
    )
    resize: Literal["image", "target", "larger"] = option(
        "image",
        "what is resized so that the grids agree: image: its images; target: its patch map, of"
        " images of its pretrained input size, to the student's grid; larger: as target, or the"
        " student's predicted map if the teacher's grid is larger",
    )
    patch: int = option(0, "patch size in pixels; 0: the model's own")
    mean: tuple[float, ...] = option(
        (), "channel means of its preprocessing, in [0, 1]; empty: the model's own"
    )
    std: tuple[float, ...] = option(
        (), "channel stds of its preprocessing, in (0, 1]; empty: the model's own"
    )
    block: str = option(
        "output", "layer whose tokens are distilled: output, middle (block) or a 0-based block"
    )
    data: str = option(
        "",
        "sources of data.train whose images it sees, comma-separated, each by the end of its path;"
        " empty: all",
    )
    weight: float = option(1.0, "weight of its loss, relative to the other teachers'")
    cls_loss: str = option("", "loss of its CLS tokens, or none; empty: as loss.cls")
    patch_loss: str = option("", "loss of its patch tokens, or none; empty: as loss.patch")
    rungs: str = option(
        "", "student blocks with projectors to it, in the form of ladder.rungs; empty: ladder.rungs"
    )
    precision: Literal["bf16", "fp32", "int8", "fp8", "int8_dynamic", "fp8_dynamic"] = option(
        "bf16",
        "precision of its forward; int8 and fp8 quantise the weights of its blocks' Linears,"
        " *_dynamic their inputs too (docs/teachers.md)",
    )
    placement: Literal["replicate", "shard", "offload"] = option(
        "replicate",
        "where its weights are kept: replicate: on each GPU; shard: sharded over the GPUs of a"
        " node; offload: sharded, in CPU memory",
        machinery=True,
    )
    micro: int = option(0, "images per forward; 0: the student's micro batch", machinery=True)
    channels_last: bool = option(False, "channels_last (NHWC) memory format, faster for CNNs")

    def __post_init__(self) -> None:
        at = f"teachers.{self.name}"
        check(
            bool(TEACHER_NAME.fullmatch(self.name)),
            "a teacher's name",
            "letters, digits and _ (a-z first)",
            self.name,
        )
        TeacherSource.parse(self.source, f"{at}.source")
        check(self.name != "pixels", "a teacher's name", "another than the baseline's", self.name)
        at_block = self.block in ("output", "middle") or self.block.isdecimal()
        check(at_block, f"{at}.block", "output, middle or a 0-based block number", self.block)
        check(self.weight > 0, f"{at}.weight", "positive", self.weight)
        for kind, text in (("cls", self.cls_loss), ("patch", self.patch_loss)):
            if text:
                loss_terms.parse(text, f"{at}.{kind}_loss", cls=kind == "cls")
        check(not self.data or bool(self.domains), f"{at}.data", "sources (or empty)", self.data)
        if self.rungs:
            RungChoice.parse(self.rungs, f"{at}.rungs")
        check_range(self.size, f"{at}.size", 0, MOST_PIXELS)
        check_range(self.patch, f"{at}.patch", 0, 1024)
        check_range(self.micro, f"{at}.micro", 0, 1_000_000)
        fits = not self.quantised or self.placement == "replicate"
        check(fits, f"{at}.placement", f"replicate with {self.precision} weights", self.placement)
        plain = not self.channels_last or self.placement == "replicate"
        check(plain, f"{at}.placement", "replicate with channels_last", self.placement)
        for key in ("mean", "std"):
            value = getattr(self, key)
            check(len(value) in (0, 3), f"{at}.{key}", "three numbers (or empty)", value)
        check_scale(self.mean, self.std, at)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names in `data`; empty: it sees all images."""
        return tuple(filter(None, map(str.strip, self.data.split(","))))

    @property
    def parsed_source(self) -> TeacherSource:
        """The parts of `source`."""
        return TeacherSource.parse(self.source, f"teachers.{self.name}.source")

    @property
    def own_side(self) -> bool:
        """True if the side of its images does not depend on the student's, whatever its model."""
        return bool(self.size) or self.resize != "image"

    @property
    def quantised(self) -> bool:
        """True if the weights of its blocks have eight bits."""
        return self.precision in EIGHT_BITS


@dataclass(frozen=True, kw_only=True)
class Student:
    """The encoder that is trained: any timm ViT."""

    model: str = option("vit_base_patch16_224", "architecture: timm's name of a ViT")
    size: int = option(224, "image size in pixels")
    registers: int = option(-1, "number of register tokens; -1: the model's own")
    heads: int = option(
        0, "attention heads of each block, each as wide as the model's; 0: the model's own number"
    )
    mlp_width: int = option(
        0, "hidden channels of each block's MLP, behind its gate if it has one; 0: the model's own"
    )
    drop_path: float = option(
        0.1, "stochastic depth (drop path) rate of the last block, growing linearly from 0"
    )
    mean: tuple[float, ...] = option(
        (0.485, 0.456, 0.406), "channel means of its preprocessing, in [0, 1]"
    )
    std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225), "channel stds of its preprocessing, in (0, 1]"
    )
    init: str = option(
        "",
        "initial weights: a model folder (a run's student/, or of import-unic) or a .safetensors"
        " file of an encoder; empty: random",
        machinery=True,  # the path may move; a checkpoint has the SHA-256 of its contents
    )
    activation_checkpointing: str = option(
        "none",
        "blocks whose activations are recomputed in backward, to save memory: none, full (all), or"
        " every:K (every K-th)",
        machinery=True,
    )

    def __post_init__(self) -> None:
        ActivationCheckpointing.parse(self.activation_checkpointing)
        check_range(self.size, "student.size", 1, MOST_PIXELS)
        check_range(self.registers, "student.registers", -1, 4096)
        check_range(self.heads, "student.heads", 0, 4096)
        check_range(self.mlp_width, "student.mlp_width", 0, 1_000_000)
        check(0 <= self.drop_path < 1, "student.drop_path", "in [0, 1)", self.drop_path)
        check(len(self.mean) == 3, "student.mean", "three numbers", self.mean)
        check(len(self.std) == 3, "student.std", "three numbers", self.std)
        check_scale(self.mean, self.std, "student")


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The projectors from student blocks to teachers; they are not part of the exported student."""

    rungs: str = option(
        "all",
        "student blocks with projectors: all, half (every second), middle, last, or 0-based numbers"
        " like 2,5,8,11",
    )
    width: int = option(0, "hidden width of the projectors; 0: the student's width")
    last_width: int = option(0, "hidden width of the last block's projectors; 0: 4 x width")
    prenorm: bool = option(False, "apply LayerNorm before each projector")
    midnorm: bool = option(False, "apply LayerNorm between the Linears of each projector")
    combine: Literal["sum", "each"] = option(
        "sum", "sum: one loss on the sum of the projections; each: the mean of one loss per block"
    )
    projector: Literal["mlp", "linear", "transformer"] = option(
        "mlp",
        "architecture of a projector: mlp: Linear-GELU-Linear; linear: one Linear; transformer: a"
        " transformer block on all tokens and a Linear",
    )
    activation_checkpointing: Literal["none", "hidden", "all"] = option(
        "hidden",
        "activation recomputation in the ladder: none; hidden: recompute GELU; all: recompute the"
        " first Linears too (+16 % of the ladder's FLOPs)",
        machinery=True,
    )

    def __post_init__(self) -> None:
        RungChoice.parse(self.rungs)
        only = not self.midnorm or self.projector == "mlp"
        check(only, "ladder.midnorm", "false unless ladder.projector is mlp", self.midnorm)
        check_range(self.width, "ladder.width", 0, 1_000_000)
        check_range(self.last_width, "ladder.last_width", 0, 1_000_000)

    @property
    def one_op(self) -> bool:
        """True if `unic_kernels` has this ladder as one fused op."""
        plain = self.projector == "mlp" and not (self.prenorm or self.midnorm)
        return plain and self.combine == "sum"
