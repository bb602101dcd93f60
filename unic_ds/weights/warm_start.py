"""Start of a run from given weights (`--student.init`).

A model folder has encoder, ladder and statistics: a finished run writes one as `student/`, and
`import-unic` does. A `.safetensors` file has an encoder in timm's names. The encoder must fit,
except for its position embeddings, which timm resamples to the run's grid. The ladder is loaded if
all of it fits, and so are the statistics; otherwise they are initialised as in any run, and a line
is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models import VisionTransformer
from torch import Tensor

from unic_ds import dist
from unic_ds.engine import deepspeed_engine
from unic_ds.files.tensor_files import Safetensors, find_unsound, misfit, read
from unic_ds.models.ladder import Ladder
from unic_ds.models.model_folder import (
    LADDER,
    STATISTICS,
    WEIGHTS,
    encoder_weights,
    files_of,
    side_of,
)
from unic_ds.models.student import Student
from unic_ds.process import console
from unic_ds.teachers import weight_files
from unic_ds.teachers.teacher_set import TeacherSet

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


@torch.no_grad()
def start_encoder(path: str, encoder: VisionTransformer) -> None:
    """Load the encoder weights at `path` into a timm ViT; ValueError unless all fit.

    A classifier, which supervised weights of timm have, is ignored. Weights are read one at a time,
    under ZeRO-3 on rank 0 only.
    """
    expected = encoder.state_dict(keep_vars=True)
    file, named = Safetensors(files_of(path)[WEIGHTS]), f"student.init {path!r}"
    found = encoder_weights(file, encoder, want=outlines(expected), named=named)
    if "pos_embed" in found and found["pos_embed"].shape != file["pos_embed"].shape:
        before, after = (side_of(x["pos_embed"], encoder, named) for x in (file, found))
        console.say(f"position embeddings resized from {before} x {before} to {after} x {after}")
    for name, value in expected.items():
        with deepspeed_engine.gathered(value) as writes:
            if writes:
                value.copy_(found[name])


@torch.no_grad()
def start_ladder(path: Path | None, ladder: Ladder) -> str:
    """Load the weights at `path` into a ladder if all fit; otherwise describe how they differ."""
    if path is None:
        return NONE
    parameters = dict(ladder.named_parameters())
    file = Safetensors(path)
    if wrong := misfit(file, ladder.export_state_dict(outlines(parameters))):
        return wrong
    for name, regions in ladder.regions().items():
        with deepspeed_engine.gathered(parameters[name]) as writes:
            for published, at in regions.items() if writes else ():
                parameters[name][at].copy_(file[published])
    return ""


def outlines(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without storage of the full shapes of weights, which ZeRO-3 may have partitioned."""
    return {
        name: torch.empty(deepspeed_engine.shape(value), device="meta")
        for name, value in parameters.items()
    }
