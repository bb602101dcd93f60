"""Import of the authors' published checkpoints (`unic.pth`, `unic_l.pth`) as a model folder.

Their file is a pickle of `model` (`module.encoder.*` in DINOv2's names with chunked blocks, and
`module.lp.*`), `teacher_ft_stats` and the program's `args` (method: section 7). A pickle can run
code, so torch's restricted unpickler reads it, which calls only functions that rebuild tensors.
Classes that `args` needs (argparse, NumPy) are replaced by an inert class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from unic_ds import config
from unic_ds.files import sha256, tensor_files
from unic_ds.files.printable import printable
from unic_ds.files.tensor_files import is_finite, misfit, not_floating, unlike_weights
from unic_ds.models.encoder import build_encoder
from unic_ds.models.ladder import Head
from unic_ds.models.ladder_description import PUBLISHED, Description, ladder_of
from unic_ds.models.model_folder import LADDER, STATISTICS
from unic_ds.tokens import KINDS
from unic_ds.weights import export

ADMITTED = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",  # files written by NumPy 1
)
"""Names admitted in addition to torch's list: tensor rebuilders, OrderedDict, `_codecs.encode`."""

FAMILIES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1536: "giant"}
"""The ViTs of the authors' program by width; the number of heads, in no tensor, is timm's."""

ODD = (RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""Errors of timm and torch that are given tensors of odd shapes."""

LICENCE = "CC BY-NC-SA 4.0"


class Discarded:
    """Stand-in for an object that is not needed: takes arguments and state, keeps none."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class Published(NamedTuple):
    """A published checkpoint as settings, weights and statistics of this package."""

    student: config.Student
    ladder: config.Ladder
    heads: dict[str, Head]
    encoder_state: dict[str, Tensor]
    ladder_state: dict[str, Tensor]
    statistics: dict[str, Tensor]

    @property
    def description(self) -> Description:
        """The description of its ladder."""
        return Description(ladder=self.ladder, heads=self.heads, standardise=PUBLISHED, teachers={})


def import_unic(path: Path, out: Path) -> Path:
    """Write the published checkpoint `path` as the model folder `out`; return `out`."""
    export.refuse_foreign(out)
    found = read(path)
    origin = (
        f"imported from {path.name} (SHA-256 {sha256(path)}; the published weights are {LICENCE})"
    )
    size = found.student.size
    images = torch.randint(
        0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return export.export(
        found.encoder_state,
        config.Config(student=found.student),
        images,
        out,
        teachers={name: {} for name in found.heads},
        extras={LADDER: found.ladder_state, STATISTICS: found.statistics},
        description=replace(found.description, origin=origin, licence=LICENCE),
        origin=origin,
        licence=LICENCE,
    )


def read(path: Path) -> Published:
    """Read the published checkpoint `path`; ValueError if it is not in the authors' layout."""
    checkpoint = unpickle(path)
    try:
        encoder, projectors = parts_of(checkpoint.get("model"))
        student, encoder = student_of(encoder)
        depth = 1 + max(int(k.split(".")[1]) for k in encoder if k.startswith("blocks."))
        width = encoder["cls_token"].shape[-1]
        ladder, heads = ladder_of(projectors, width, depth)
        statistics = statistics_of(checkpoint.get("teacher_ft_stats"), heads)
    except (ValueError, *ODD) as error:
        why = printable(str(error) or type(error).__name__)
        raise ValueError(f"{str(path)!r} is not in the published layout: {why}") from None
    return Published(student, ladder, heads, encoder, projectors, statistics)


def unpickle(path: Path) -> dict[str, Any]:
    """Load the dict of a checkpoint file; ValueError as `tensor_files.unpickle`."""
    if not path.exists():
        raise ValueError(f"there is no file {str(path)!r}; give a published checkpoint")
    admitted = [(Discarded, name) for name in ADMITTED]
    checkpoint = tensor_files.unpickle(path, admitted, checksums=True)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} holds no checkpoint but a {type(checkpoint).__name__}")
    found = [checkpoint.get("model"), *statistics_in(checkpoint.get("teacher_ft_stats"))]
    values = [value for part in found if isinstance(part, dict) for value in part.values()]
    tensor_files.refuse_many(path, len(values))
    tensor_files.refuse_oversized(path, (v for v in values if isinstance(v, Tensor)))
    return checkpoint


def statistics_in(found: object) -> Iterator[object]:
    """Yield the dict of each teacher and kind of token in a checkpoint's statistics."""
    for kinds in found.values() if isinstance(found, dict) else ():
        yield from kinds.values() if isinstance(kinds, dict) else ()


def parts_of(model: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split weights into the encoder's, with blocks unchunked, and the ladder's, in fp32."""
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "lp": {}}
    for name, value in tensors(model, "model").items():
        part, _, rest = name.removeprefix("module.").partition(".")
        if part not in parts:
            raise ValueError(f"{printable(name)} is neither of the encoder nor of the ladder (lp)")
        parts[part][re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", rest)] = value
    return parts["encoder"], parts["lp"]


def tensors(found: object, what: str) -> dict[str, Tensor]:
    """Copy a dict of finite tensors in fp32; ValueError for anything else."""
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{what} is missing")
    for name, value in found.items():
        if not isinstance(name, str):
            raise ValueError(f"{what} has {printable(name)}, which is no tensor of weights")
        why = unlike_weights(value)
        if why or not value.is_floating_point():
            why = why or not_floating(value)
            raise ValueError(f"{what} has {printable(name)}, which is no tensor of weights: {why}")
        if not is_finite(value):
            raise ValueError(f"{what} has {printable(name)}, which is not finite")
    return {
        name: value.float().clone(memory_format=torch.contiguous_format)
        for name, value in found.items()
    }


def student_of(state: dict[str, Tensor]) -> tuple[config.Student, dict[str, Tensor]]:
    """Find the timm ViT of these encoder weights; its settings, and the weights under its names."""
    for name, ndim in (("cls_token", 3), ("pos_embed", 3), ("patch_embed.proj.weight", 4)):
        if name not in state or state[name].ndim != ndim:
            raise ValueError(f"the encoder has no {name}")
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(state["pos_embed"].shape[1])
    if side * side + 1 != state["pos_embed"].shape[1]:
        raise ValueError(f"pos_embed is {tuple(state['pos_embed'].shape)}, no square grid and CLS")
    kinds = ("reg4_dinov2",) if "register_tokens" in state else ("224", "dinov2")
    names = [f"vit_{FAMILIES.get(width)}_patch{patch}_{kind}" for kind in kinds]
    wrong = ""
    for model in filter(timm.is_model, names):
        student = config.Student(model=model, size=side * patch, drop_path=0.0)
        with torch.device("meta"):
            encoder = build_encoder(student)
        renamed = checkpoint_filter_fn(dict(state), encoder)
        problem = misfit(renamed, encoder.state_dict())
        if not problem:
            return student, renamed
        wrong += f"; {model}: {problem}"
    raise ValueError(
        f"no ViT of timm has these encoder weights ({width} wide, patches of {patch}{wrong})"
    )


def statistics_of(found: object, heads: dict[str, Head]) -> dict[str, Tensor]:
    """Convert running statistics to `TEACHER.mean_2C` and `.std_2C`."""
    if not isinstance(found, dict) or found.keys() != heads.keys():
        raise ValueError(f"teacher_ft_stats is not of the ladder's teachers {', '.join(heads)}")
    statistics = {}
    for name, head in heads.items():
        if not isinstance(found[name], dict):
            raise ValueError(f"teacher_ft_stats of {name} is missing")
        kinds = [tensors(found[name].get(kind), f"teacher_ft_stats of {name}") for kind in KINDS]
        for key in ("mean", "std"):
            if any(key not in kind or kind[key].numel() != head.width for kind in kinds):
                raise ValueError(
                    f"teacher_ft_stats of {name} has no {key} of {head.width} channels"
                )
            statistics[f"{name}.{key}_2C"] = torch.stack([kind[key].flatten() for kind in kinds])
    return statistics
