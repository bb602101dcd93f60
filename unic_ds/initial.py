"""Weights that a run starts from (`--student.init`).

A model folder is what a finished run writes as `student/` and what `import-unic` writes: encoder,
ladder and statistics. A bare `.safetensors` file holds an encoder in timm's names. The encoder must
fit, save for its position embeddings, which timm resamples to the run's grid; ladder and statistics
are taken whole, or start anew and a line says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from unic_ds import dist, log
from unic_ds.teachers.weights import sha256

if TYPE_CHECKING:
    from unic_ds.student import Student
    from unic_ds.teachers.pool import Teachers

WEIGHTS, LADDER = "model.safetensors", "ladder.safetensors"
STATISTICS = "statistics.safetensors"


def start(path: str, student: Student, teachers: Teachers) -> dict[str, str]:
    """Start `student` and the teachers' statistics from `path`; SHA-256 of each file it has.

    Every rank calls it. ValueError where the encoder's weights are missing or do not fit.
    """
    files = files_of(path)
    start_encoder(path, student.encoder)
    taken = ["encoder"]
    ladder = student.ladder
    parts = (
        (LADDER, ladder.published(), ladder.load_published),
        (STATISTICS, teachers.state_dict(), teachers.load_state_dict),
    )
    for name, want, load in parts:
        what = name.partition(".")[0]
        state = read(files[name]) if name in files else {}
        wrong = misfit(state, want) if state else f"{path} has none"
        if wrong:
            log.say(f"the {what} start{'s' * (what == 'ladder')} anew: {wrong}")
            continue
        load(state)
        taken.append(what)
    log.say(f"starts from {path}: {', '.join(taken)}")
    hashes = {name: sha256(file) for name, file in files.items()} if dist.rank() == 0 else None
    return dist.share(hashes)


def files_of(path: str) -> dict[str, Path]:
    """The files of a model folder, or of a bare file of encoder weights, by their name there."""
    given = Path(path).expanduser()
    if not given.is_dir():
        return {WEIGHTS: given}
    names = (WEIGHTS, LADDER, STATISTICS)
    return {name: given / name for name in names if (given / name).is_file()}


def start_encoder(path: str, encoder: Any) -> None:
    """Give a timm ViT the encoder weights at `path`; ValueError unless all fit.

    A classifier is left behind: supervised weights of timm have one, an encoder has not.
    """
    state = {k: v for k, v in read(files_of(path)[WEIGHTS]).items() if not k.startswith("head.")}
    if "pos_embed" in state and getattr(encoder, "pos_embed", None) is not None:
        state["pos_embed"] = resized(state["pos_embed"], encoder, path)
    if wrong := misfit(state, encoder.state_dict()):
        model = encoder.pretrained_cfg.get("architecture", "the student")
        raise ValueError(f"student.init {path!r} does not fit {model}: {wrong}")
    encoder.load_state_dict(state)


def resized(pos_1ND: Tensor, encoder: Any, path: str) -> Tensor:
    """Position embeddings on the encoder's grid, by timm's own resampling."""
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    grid, side = encoder.patch_embed.grid_size, math.isqrt(max(pos_1ND.shape[1] - prefix, 0))
    if pos_1ND.ndim != 3 or side == 0 or side * side + prefix != pos_1ND.shape[1]:
        raise ValueError(
            f"student.init {path!r} has position embeddings {tuple(pos_1ND.shape)}: they are no"
            f" square grid after {prefix} prefix tokens"
        )
    if (side, side) == tuple(grid):
        return pos_1ND
    log.say(f"position embeddings resized from {side} x {side} to {grid[0]} x {grid[1]}")
    return resample_abs_pos_embed(pos_1ND, new_size=list(grid), num_prefix_tokens=prefix)


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError where it is missing or damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as safetensors ({error})") from None


def misfit(state: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """How names and shapes of weights differ from those wanted, in words; nothing where they fit.

    Of every kind of difference the first is named.
    """
    shapes = [
        f"{k} is {tuple(v.shape)}, not {tuple(want[k].shape)}"
        for k, v in state.items()
        if k in want and v.shape != want[k].shape
    ]
    kinds = (
        [f"{name} is missing" for name in sorted(want.keys() - state.keys())],
        [f"{name} is unknown" for name in sorted(state.keys() - want.keys())],
        shapes,
    )
    said = [
        f"{rows[0]}{f' and {len(rows) - 1} more' if rows[1:] else ''}" for rows in kinds if rows
    ]
    return "; ".join(said)
