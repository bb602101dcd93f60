"""A student that is handed over, and the contract of the formats that it can be written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from unic_ds import config
from unic_ds.models.encoder import features_and_residuals
from unic_ds.models.ladder import Ladder
from unic_ds.teachers.phi_s import PhiS
from unic_ds.teachers.standardise import Standardiser
from unic_ds.tokens import KINDS, Normalise, Tokens
from unic_ds.weights import narrow_code

Precision = Literal["", "int8", "bf16"]
"""Precision of an exported student's weights; empty: fp32."""
OTHERS = {"int8": "--to onnx or --to export", "bf16": "--to export"}
"""Formats of a precision, as a remedy."""
Outputs = dict[str, Tensor]
"""`cls` [B, D], `patch` [B, N, D], and `TEACHER_cls`, `TEACHER_patch` of kept projectors."""


class Predictions(nn.Module):
    """Predictions of teachers' features, standardisation undone, as tensors by name.

    A ladder with a loss per rung (`combine = each`) predicts the whole target at each: the last
    one's counts. A kind of token that is not learned is left out.
    """

    def __init__(
        self, ladder: Ladder, teachers: tuple[str, ...], norms: Mapping[str, Standardiser]
    ):
        super().__init__()
        self.ladder, self.teachers = ladder, teachers
        for name in teachers:
            scale, offset_2C = undoing(norms[name])
            self.register_buffer(f"scale_{name}", scale)
            self.register_buffer(f"offset_{name}", offset_2C)

    def forward(self, states: list[Tokens]) -> Outputs:
        pred = self.ladder(states)
        found = {}
        for name in self.teachers:
            scale, offset_2C = self.get_buffer(f"scale_{name}"), self.get_buffer(f"offset_{name}")
            for i, kind in enumerate(KINDS):
                y_C = pred[name][i]
                if y_C.ndim > 1:  # not by its length, which a graph would fix
                    y_C = (y_C[-1] if self.ladder.cfg.combine == "each" else y_C).float()
                    y_C = y_C @ scale[i] if scale.ndim == 3 else y_C * scale[i]
                    found[f"{name}_{kind}"] = y_C + offset_2C[i]
        return found


@torch.no_grad()
def undoing(norm: Standardiser) -> tuple[Tensor, Tensor]:
    """The affine map of `Standardiser.undo`: factors [2, C], or a matrix [2, C, C], and offsets."""
    zero_2C = torch.zeros_like(norm.mean_2C)
    if not norm.cfg.on:
        return torch.ones_like(zero_2C), zero_2C
    offset_2C = torch.stack([norm.undo_kind(zero_2C[i], i) for i in range(2)])
    if isinstance(norm, PhiS):
        eye_CC = torch.eye(zero_2C.shape[1])
        maps = [norm.undo_kind(eye_CC, i) - offset_2C[i] for i in range(2)]
        return torch.stack(maps), offset_2C
    return norm.divisor(), offset_2C


@dataclass(frozen=True, kw_only=True)
class TextSide:
    """The text tower of a teacher, for open_clip."""

    teacher: str
    settings: Mapping[str, Any]
    """open_clip's config of the teacher."""
    state: Mapping[str, Tensor]
    """Its weights but for the image tower's, by open_clip's names."""
    project: Callable[[Tensor], Tensor]
    """Embeddings (B, E) of the teacher's summaries (B, C)."""
    embed: Callable[[Sequence[str]], Tensor]
    """Unit embeddings (M, E) of texts."""
    save_tokenizer: Callable[[Path], None]
    """Writes the tokenizer's files into a folder, if open_clip has not its own."""


@dataclass(frozen=True, kw_only=True)
class Handover:
    """A frozen student in fp32 on the CPU, at the side of `cfg`, and what is said of it."""

    cfg: config.Student
    encoder: VisionTransformer
    sample: Callable[[int], Tensor]
    """Function of a side in pixels: a few images, uint8 B3HW."""
    predictions: Predictions | None = None
    teachers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Facts of each teacher by name, as in ladder.json."""
    origin: str = ""
    """The source of the weights, if no run has trained them."""
    licence: str = ""
    """Their licence then."""
    text: TextSide | None = None
    """For openclip alone."""
    real_images: bool = True
    """False if no run's images are known, and `sample` returns noise."""

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.encoder.patch_embed.patch_size[0]

    @torch.no_grad()
    def outputs(self, image_B3HW: Tensor) -> Outputs:
        """Outputs that an export must have for uint8 images."""
        x_B3HW = Normalise(self.cfg.mean, self.cfg.std)(image_B3HW, torch.float32)
        return outputs_of(self.encoder, self.predictions, x_B3HW)


def outputs_of(
    encoder: VisionTransformer, predictions: Predictions | None, x_B3HW: Tensor
) -> Outputs:
    """Outputs of normalised images."""
    blocks = predictions.ladder.blocks if predictions else [len(encoder.blocks) - 1]
    tokens, states = features_and_residuals(encoder, x_B3HW, blocks)
    found = dict(zip(KINDS, tokens, strict=True))
    return found | (predictions(states) if predictions else {})


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that a student can be written in."""

    title: str
    """The library that loads it, for the card."""
    library: str
    """Name of that library on the Hugging Face hub."""
    task: str = "image-feature-extraction"
    """The hub's name of what it does."""
    loading: str
    """Program that loads the folder THIS_FOLDER."""
    running: str
    """Program that makes `outputs`, tensors by name, of uint8 `images` [B, height, width, 3]."""
    files: frozenset[str]
    """Names of its files, without the card's."""
    binding: str = "import torch\n\ntorch.set_num_threads(THREADS)\n"
    """Program that bounds the library's THREADS, before it loads a folder."""
    write: Callable[[Handover, Path, Precision], None] | None = None
    """Writes the files into a folder, with weights in a precision.

    ValueError if the student's shape does not fit. None: `weights.export` writes them.
    """
    packages: tuple[str, ...] = ()
    """Optional packages, by the names of their modules."""
    quantises: frozenset[Precision] = frozenset()
    """Precisions that it has beside fp32."""
    predicts: bool = False
    """True if it has a place for predictions of teachers' features."""
    reference: Callable[[Handover, Tensor], Outputs] | None = None
    """Outputs that it must have for uint8 images B3HW; None: tokens and kept predictions."""
    sizes: Callable[[Handover], bool] = lambda _: False
    """True if one export takes images of any side that is a multiple of the patch."""

    @property
    def snippet(self) -> str:
        """The program that loads and runs an export."""
        return f"{self.loading}\n{self.running}"

    def loading_in(self, folder: Path) -> str:
        """The program that loads the export in a folder, which it calls THIS_FOLDER.

        No code of the folder is run.
        """
        return narrow_code.registered(folder) + self.loading

    def bind(self, threads: int) -> str:
        """The program that bounds the library's threads."""
        return self.binding.replace("THREADS", str(threads))

    def check(self, name: str, *, quantise: Precision, predict: bool) -> None:
        """ValueError for a package that is missing, or a form that the format does not have."""
        if missing := [package for package in self.packages if find_spec(package) is None]:
            raise ValueError(
                f"--to {name} needs the package {missing[0]}, which is not installed;"
                " pip install -e '.[export]'"
            )
        if quantise and quantise not in self.quantises:
            raise ValueError(
                f"--quantize {quantise} has no form in {name}; choose {OTHERS[quantise]}"
            )
        if predict and not self.predicts:
            raise ValueError(
                f"--keep_projectors has no place in {name}, whose model has tokens alone; choose"
                " --to onnx or --to export"
            )
