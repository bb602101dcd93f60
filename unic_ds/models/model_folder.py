"""Model folder of a student: its encoder in timm's hub format, and the ladder with its statistics.

A finished run writes one as `student/`, and `import-unic` does. `config.json` describes the encoder
(timm's format), `ladder.json` the ladder (`ladder_description`). Everything in it is checked before
memory is allocated for it: it may come from outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor

from unic_ds import config
from unic_ds.config import overrides
from unic_ds.files.documents import read_json
from unic_ds.files.printable import printable
from unic_ds.files.tensor_files import Safetensors, find_unsound, misfit
from unic_ds.models import ladder_description
from unic_ds.models.encoder import NARROW, build_encoder
from unic_ds.models.ladder import Ladder
from unic_ds.models.ladder_description import Description
from unic_ds.models.meta import NoInit
from unic_ds.models.student import ladder_on

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LADDER, STATISTICS = "ladder.safetensors", "statistics.safetensors"


def files_of(path: str) -> dict[str, Path]:
    """Weight files of a model folder by name; a bare file of encoder weights is the encoder's."""
    expanded = Path(path).expanduser()
    if not expanded.is_dir():
        return {WEIGHTS: expanded}
    names = (WEIGHTS, LADDER, STATISTICS)
    return {name: expanded / name for name in names if (expanded / name).is_file()}


def encoder_weights(
    state: Mapping[str, Tensor],
    encoder: VisionTransformer,
    *,
    want: Mapping[str, Tensor],
    named: str,
) -> Mapping[str, Tensor]:
    """The weights `state` for an encoder, position embeddings resampled to its grid.

    `want` has the encoder's weights, or tensors of their shapes. A classifier, which supervised
    weights of timm have, is ignored. ValueError, which begins with `named`, unless all fit.
    """
    found = without_classifier(state)
    if "pos_embed" in found and getattr(encoder, "pos_embed", None) is not None:
        found["pos_embed"] = resized(found["pos_embed"], encoder, named)
    if wrong := misfit(found, want):
        model = vars(encoder)["pretrained_cfg"].get("architecture", "the student")
        raise ValueError(f"{named} does not fit {model}: {wrong}")
    return found


def without_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a timm ViT without those of its classifier."""
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def resized(pos_1ND: Tensor, encoder: VisionTransformer, named: str) -> Tensor:
    """Resample position embeddings to the encoder's grid, as timm does; ValueError as `side_of`."""
    side, grid = side_of(pos_1ND, encoder, named), encoder.patch_embed.grid_size
    if (side, side) == tuple(grid):
        return pos_1ND
    prefix = prefix_of(encoder)
    return resample_abs_pos_embed(pos_1ND, new_size=list(grid), num_prefix_tokens=prefix)


def side_of(pos_1ND: Tensor, encoder: VisionTransformer, named: str) -> int:
    """Side of the patch grid of position embeddings; ValueError if they are no square grid."""
    prefix = prefix_of(encoder)
    side = math.isqrt(max(pos_1ND.shape[1] - prefix, 0)) if pos_1ND.ndim == 3 else 0
    if side == 0 or side * side + prefix != pos_1ND.shape[1]:
        raise ValueError(
            f"{named} has position embeddings {tuple(pos_1ND.shape)}: they are no square grid"
            f" after {prefix} prefix tokens"
        )
    return side


def prefix_of(encoder: VisionTransformer) -> int:
    """Number of prefix tokens that have position embeddings."""
    return 0 if encoder.no_embed_class else encoder.num_prefix_tokens


@torch.no_grad()
def encoder_of(cfg: config.Student, state: Mapping[str, Tensor], named: str) -> VisionTransformer:
    """A frozen encoder in fp32 with these weights, position embeddings resampled to `cfg.size`.

    ValueError as `encoder_weights` and `build_encoder`; the global random state is left as it is.
    """
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(replace(cfg, drop_path=0.0))
    weights = encoder_weights(state, encoder, want=encoder.state_dict(), named=named)
    encoder.load_state_dict({name: value.float() for name, value in weights.items()})
    return encoder.requires_grad_(False).eval()


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a student."""

    path: Path

    @property
    def named(self) -> str:
        """The folder's name in messages."""
        return f"model folder {printable(self.path)!r}"

    @property
    def run(self) -> Path | None:
        """The run that it was written by: RUN/student*, or RUN/encoders/CHECKPOINT; else None.

        Another folder's config.yaml need not be of a run.
        """
        path = self.path.absolute()
        if path.parent.name == "encoders":
            run = path.parent.parent
        elif path.name.startswith("student"):
            run = path.parent
        else:
            return None
        return run if (run / "config.yaml").is_file() else None

    @cached_property
    def files(self) -> dict[str, Path]:
        """Weight files that it has, by name; ValueError if the encoder's is missing."""
        found = files_of(str(self.path))
        if WEIGHTS not in found or not self.path.is_dir():
            raise ValueError(f"{self.named} holds no {WEIGHTS}; give a run's student/ folder")
        return found

    @cached_property
    def student(self) -> config.Student:
        """Settings of the encoder, without drop path; ValueError unless `config.json` has them."""
        try:
            found = read_json(self.path / CONFIG)
            settings = overrides.from_dict({"student": student_keys(found)}).student
        except ValueError as error:
            raise ValueError(f"{self.named}: {CONFIG} describes no student ({error})") from None
        return settings

    def tensors(self, name: str) -> Safetensors:
        """Tensors of a weight file, mapped; ValueError if they are no sound weights."""
        state = Safetensors(self.files[name])
        if problem := find_unsound(state):
            raise ValueError(f"{self.named}: {name} holds no sound weights: {problem}")
        return state

    def encoder(self, size: int = 0) -> VisionTransformer:
        """The frozen encoder in fp32 on the CPU; ValueError if its weights are of another.

        Position embeddings are resampled to images of `size` px; 0: the student's own.
        """
        cfg = replace(self.student, size=size or self.student.size)
        return encoder_of(cfg, self.check_encoder(), self.named)

    def check_encoder(self) -> Safetensors:
        """The encoder's weights, mapped; ValueError unless they are those of `config.json`."""
        state = self.tensors(WEIGHTS)
        with torch.device("meta"), NoInit():
            outline = build_encoder(self.student).state_dict()
        if wrong := misfit(without_classifier(state), outline):
            raise ValueError(f"{self.named}: {WEIGHTS} does not fit {CONFIG}: {wrong}")
        return state

    def ladder(self, encoder: VisionTransformer, description: Description) -> Ladder:
        """The frozen ladder in fp32 on the CPU; ValueError if its weights are of another."""
        file = self.tensors(LADDER)
        with torch.device("meta"):
            outline = ladder_on(encoder, description.ladder, description.heads)
        if wrong := misfit(file, outline.export_state_dict()):
            raise ValueError(f"{self.named}: {LADDER} is not the ladder described: {wrong}")
        with torch.random.fork_rng(devices=[]):
            ladder = ladder_on(encoder, description.ladder, description.heads)
        with torch.no_grad():
            for name, value in ladder.export_state_dict().items():
                value.copy_(file[name])
        return ladder.requires_grad_(False).eval()

    def description(self, encoder: VisionTransformer) -> Description | str:
        """The description of its ladder, or a clause that says why there is none.

        An older folder has no `ladder.json`: its run's settings describe the ladder, or else the
        names and shapes of its weights. ValueError for a file that describes no ladder.
        """
        if not self.files.keys() >= {LADDER, STATISTICS}:
            return f"the folder has no {LADDER} and {STATISTICS}"
        if (self.path / ladder_description.FILE).is_file():
            return ladder_description.read(self.path / ladder_description.FILE)
        if self.run and (self.run / "teachers.json").is_file():
            return ladder_description.of_older_run(self.run)
        try:
            state = Safetensors(self.files[LADDER])
            return ladder_description.derive(state, encoder.embed_dim, len(encoder.blocks))
        except ValueError as error:
            return f"no {ladder_description.FILE} describes its ladder, and {error}"


def student_keys(found: object) -> dict[str, object]:
    """The settings of a student in timm's `config.json`."""
    plain = found if isinstance(found, dict) else {}
    images, arguments = (plain.get(key) for key in ("pretrained_cfg", "model_args"))
    images = images if isinstance(images, dict) else {}
    arguments = arguments if isinstance(arguments, dict) else {}
    shape = images.get("input_size")
    model = plain.get("architecture")
    keys: dict[str, object] = {
        "model": arguments.get("base") if model == NARROW else model,
        "size": shape[-1] if isinstance(shape, list) and shape else None,
        "mean": images.get("mean"),
        "std": images.get("std"),
        "drop_path": 0.0,
    }
    shape = {"reg_tokens": "registers"}
    if model == NARROW:
        shape |= {"heads": "heads", "mlp_width": "mlp_width"}
    return keys | {key: arguments[name] for name, key in shape.items() if name in arguments}
