"""Export of a student as a folder that timm loads, from a run or from one of its checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unic_ds import config, data
from unic_ds.config import job, recipes
from unic_ds.data.source import Source
from unic_ds.engine import reshard
from unic_ds.files import run_files, tensor_files
from unic_ds.models import ladder_description
from unic_ds.models.ladder import Ladder, heads_of
from unic_ds.models.model_folder import LADDER, STATISTICS
from unic_ds.models.student import build_encoder, ladder_on
from unic_ds.training import checkpoint
from unic_ds.training.setup import sample_images
from unic_ds.weights.export import export


def write(
    encoder_state: dict[str, Tensor],
    ladder: Ladder,
    ladder_state: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    *,
    cfg: config.Config,
    source: Source,
    out: Path,
    teachers: Mapping[str, Mapping[str, Any]],
    prove: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write encoder, ladder, statistics and description to the folder `out`; return it.

    `ladder_state` has the names of `ladder`'s parameters; `teachers` is the run's manifest, and
    `source` its training images. Errors as `weights.export.export`.
    """
    extras = {LADDER: ladder.export_state_dict(ladder_state), STATISTICS: statistics}
    images = sample_images(cfg, source)(cfg.student.size)  # the export is compared on them
    return export(
        encoder_state,
        cfg,
        images,
        out,
        teachers=teachers,
        extras=extras,
        description=ladder_description.of_run(cfg, teachers),
        prove=prove,
    )


def from_checkpoint(
    run: Path, *, out: str = "", prove: Callable[[Path], None] = lambda _: None
) -> Path:
    """Export the newest undamaged checkpoint of a run's current stage; return the folder.

    `out` is the new folder; if empty, `encoders/CHECKPOINT` of the stage; `prove` checks it before
    it gets its name. ValueError if there is no checkpoint.
    """
    cfg, folder = newest_stage(run)
    found = checkpoint.find(folder / "checkpoints", "auto")
    if found is None:
        raise ValueError(f"--run {str(folder)!r} holds no checkpoint yet")
    states: dict[str, dict[str, Tensor]] = {"encoder": {}, "ladder": {}}
    for name, value in reshard.weights(found / checkpoint.SHARDS).items():
        model, _, rest = name.partition(".")
        states[model][rest] = value
    teachers = json.loads((folder / run_files.TEACHERS).read_text())
    with torch.device("meta"):  # only its weights' names are used
        heads = heads_of(cfg, {name: row["width"] for name, row in teachers.items()})
        ladder = ladder_on(build_encoder(cfg.student), cfg.ladder, heads)
    statistics = tensor_files.read(found / checkpoint.STATISTICS)
    with redirect_stdout(sys.stderr):  # a script reads the exported folder's path
        source = data.scan(cfg.data.train)
        return write(
            states["encoder"],
            ladder,
            states["ladder"],
            {k: v for k, v in statistics.items() if k.split(".")[0] in teachers},
            cfg=cfg,
            source=source,
            out=Path(out) if out else folder / "encoders" / found.name,
            teachers=teachers,
            prove=prove,
        )


def newest_stage(run: Path) -> tuple[config.Config, Path]:
    """(settings, folder) of a run's last stage that has a checkpoint, or else of the run."""
    stages = job.staged(recipes.read(run / "config.yaml"), run)
    saved = [stage for stage in stages if any((stage[1] / "checkpoints").glob("step_*"))]
    return (saved or stages)[-1]
