"""Start of a run from given weights (`--student.init`).

A model folder has encoder, ladder and statistics: a finished run writes one as `student/`, and
`import-unic` does. A `.safetensors` file has an encoder in timm's names. The encoder must fit,
except for its position embeddings, which timm resamples to the run's grid. The ladder is loaded if
all of it fits, and so are the statistics; otherwise they are initialised as in any run, and a line
is printed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor

from unic_ds import dist
from unic_ds.engine import deepspeed_engine
from unic_ds.files.printable import printable
from unic_ds.files.tensor_files import Safetensors, is_finite, not_floating, read, unlike_weights
from unic_ds.models.ladder import Ladder
from unic_ds.models.student import Student
from unic_ds.process import console
from unic_ds.teachers import weight_files
from unic_ds.teachers.teacher_set import TeacherSet

WEIGHTS, LADDER = "model.safetensors", "ladder.safetensors"
STATISTICS = "statistics.safetensors"
NONE = "the folder has none"


def start(path: str, student: Student, teachers: TeacherSet) -> dict[str, dict[str, str]]:
    """Load the weights at `path` into `student` and the teachers' statistics, as far as they fit.

    Every rank calls it. Returns `weight_files.hashes` of each file. ValueError if the encoder's
    weights are missing, do not fit or are not finite.
    """
    files = files_of(path)
    hashes = dist.on_rank_0(lambda: check_files(files))
    start_encoder(path, student.encoder)
    loaded = ["encoder"]
    if wrong := start_ladder(files.get(LADDER), student.ladder):
        console.say(f"the ladder is not loaded: {wrong}")
    else:
        loaded.append("ladder")
    state = read(files[STATISTICS]) if STATISTICS in files else {}
    if wrong := misfit(state, teachers.state_dict()) if state else NONE:
        console.say(f"the statistics are not loaded: {wrong}")
    else:
        teachers.load_state_dict(state)
        loaded.append("statistics")
    console.say(f"starts from {path}: {', '.join(loaded)}")
    return hashes


def check_files(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """`weight_files.hashes` of each file; ValueError for weights that `find_unsound` describes."""
    found = {}
    for name, file in files.items():
        if problem := find_unsound(Safetensors(file)):
            raise ValueError(f"student.init {str(file)!r} holds no sound weights: {problem}")
        found[name] = weight_files.hashes(file)
    return found


def find_unsound(state: Mapping[str, Tensor]) -> str:
    """Describe the first tensor that is not floating or not finite; empty if there is none."""
    for name, value in state.items():
        if name.endswith(".num_batches_tracked"):
            continue
        why = unlike_weights(value)
        if not why and not value.is_floating_point():
            why = not_floating(value)
        if not why and not is_finite(value):
            why = "is not finite"
        if why:
            return f"{printable(name)} {why}"
    return ""


def files_of(path: str) -> dict[str, Path]:
    """Files of a model folder by name; a bare file of encoder weights counts as the encoder's."""
    expanded = Path(path).expanduser()
    if not expanded.is_dir():
        return {WEIGHTS: expanded}
    names = (WEIGHTS, LADDER, STATISTICS)
    return {name: expanded / name for name in names if (expanded / name).is_file()}


@torch.no_grad()
def start_encoder(path: str, encoder: VisionTransformer) -> None:
    """Load the encoder weights at `path` into a timm ViT; ValueError unless all fit.

    A classifier, which supervised weights of timm have, is ignored. Weights are read one at a time,
    under ZeRO-3 on rank 0 only.
    """
    expected = encoder.state_dict(keep_vars=True)
    file = Safetensors(files_of(path)[WEIGHTS])
    found = {name: value for name, value in file.items() if not name.startswith("head.")}
    changed = {}
    if "pos_embed" in found and getattr(encoder, "pos_embed", None) is not None:
        changed["pos_embed"] = resized(found["pos_embed"], encoder, path)
    if wrong := misfit(found | changed, expected):
        model = vars(encoder)["pretrained_cfg"].get("architecture", "the student")
        raise ValueError(f"student.init {path!r} does not fit {model}: {wrong}")
    for name, value in expected.items():
        with deepspeed_engine.gathered(value) as writes:
            if writes:
                value.copy_(changed.get(name, found[name]))


@torch.no_grad()
def start_ladder(path: Path | None, ladder: Ladder) -> str:
    """Load the weights at `path` into a ladder if all fit; otherwise describe how they differ."""
    if path is None:
        return NONE
    parameters = dict(ladder.named_parameters())
    outlines = {k: empty(deepspeed_engine.shape(v)) for k, v in parameters.items()}
    file = Safetensors(path)
    if wrong := misfit(file, ladder.export_state_dict(outlines)):
        return wrong
    for name, regions in ladder.regions().items():
        with deepspeed_engine.gathered(parameters[name]) as writes:
            for published, at in regions.items() if writes else ():
                parameters[name][at].copy_(file[published])
    return ""


def empty(shape: torch.Size) -> Tensor:
    """A tensor of that shape without storage."""
    return torch.empty(shape, device="meta")


def resized(pos_1ND: Tensor, encoder: VisionTransformer, path: str) -> Tensor:
    """Resample position embeddings to the encoder's grid, as timm does."""
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    grid, side = encoder.patch_embed.grid_size, math.isqrt(max(pos_1ND.shape[1] - prefix, 0))
    if pos_1ND.ndim != 3 or side == 0 or side * side + prefix != pos_1ND.shape[1]:
        raise ValueError(
            f"student.init {path!r} has position embeddings {tuple(pos_1ND.shape)}: they are no"
            f" square grid after {prefix} prefix tokens"
        )
    if (side, side) == tuple(grid):
        return pos_1ND
    console.say(f"position embeddings resized from {side} x {side} to {grid[0]} x {grid[1]}")
    return resample_abs_pos_embed(pos_1ND, new_size=list(grid), num_prefix_tokens=prefix)


def misfit(state: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """Describe how names and shapes of weights differ from those of `want`; empty if they fit.

    The first difference of each kind is named.
    """
    shapes = [
        f"{printable(k)} is {tuple(v.shape)}, not {tuple(deepspeed_engine.shape(want[k]))}"
        for k, v in state.items()
        if k in want and v.shape != deepspeed_engine.shape(want[k])
    ]
    kinds = (
        [f"{name} is missing" for name in sorted(want.keys() - state.keys())],
        [f"{printable(name)} is unknown" for name in sorted(state.keys() - want.keys())],
        shapes,
    )
    clauses = [
        f"{rows[0]}{f' and {len(rows) - 1} more' if rows[1:] else ''}" for rows in kinds if rows
    ]
    return "; ".join(clauses)
