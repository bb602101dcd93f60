"""The work of `unic-ds teachers compare`: features of each teacher, their comparison, its files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config, dist, files
from unic_ds.analysis import comparison, comparison_picture, selection
from unic_ds.analysis.comparison import Comparison, Labels
from unic_ds.config.evaluation import FEWEST_COMPARED
from unic_ds.evaluate.extraction import extract
from unic_ds.evaluate.features import FILLER, FeatureSet, Model
from unic_ds.evaluate.quarters import Quarters, summarised
from unic_ds.files import run_files
from unic_ds.files.printable import printable
from unic_ds.harness import models, session
from unic_ds.harness.image_sets import SampledImages, scan
from unic_ds.models.encoder import grid_of
from unic_ds.planning.trace import TeacherCost, outlined, teacher_cost
from unic_ds.training import gradient_conflict

TIMEOUT_S = 4 * 3600
"""Longest wait of a rank for the numbers, which rank 0 computes."""

Plain = dict[str, Any]
"""A comparison as JSON."""


def compare(
    cfg: config.Config,
    *,
    images: int,
    budget: float | None,
    student: Path | None,
    out: Path | None,
    as_json: bool,
) -> Plain:
    """Compare the teachers of a recipe on at most `images` images; every rank calls it.

    `out` gets the comparison as JSON, and a picture. Progress goes to stderr if `as_json`.
    ValueError, one sentence, for a user's mistake, before any feature is computed.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        dist.start(TIMEOUT_S)
        cfg = replace(cfg, teachers=tuple(measured_row(row, cfg) for row in cfg.teachers))
        grid = grid_of(cfg.student)
        costs = {row.name: teacher_cost(row, grid, 1) for row in cfg.teachers}
        gflops = {name: cost.flops / 1e9 for name, cost in costs.items()}
        selection.check_budget(gflops, budget)
        conflict = gradient_conflict.open_student(student, cfg) if student else None
        chosen = sample(cfg, images)
        teachers = models.build(list(gflops), cfg, dist.device(), export=lambda run: run)
        found = extract([summarised(x) for x in teachers], chosen, session.feature_store(cfg))
        place_N, features = gathered(found)
        labels = Labels(found.label_N[place_N], chosen.classes)
        cosine_TT = conflict.measure(teachers, chosen) if conflict else None

        def measure() -> Plain:
            by_kind = {name: Quarters.of_rows(rows).by_kind() for name, rows in features.items()}
            result = comparison.compare(by_kind, labels, gflops, budget=budget, seed=cfg.seed)
            facts = {x.name: facts_of(x, costs[x.name], cfg) for x in teachers}
            plain = as_plain(result, facts, budget=budget)
            plain["gradients"] = cosine_TT
            plain["data"] = cfg.data.train
            if out:
                write(plain, out)
            return plain

        return dist.on_rank_0(measure)


def measured_row(row: config.Teacher, cfg: config.Config) -> config.Teacher:
    """The row as `models.read_teacher` runs it: in fp32, of images of `eval.size`, if given."""
    return replace(row, precision="fp32", size=cfg.eval.size or row.size)


def sample(cfg: config.Config, images: int) -> SampledImages:
    """A seeded sample of the images, spread over the classes; ValueError if they are too few."""
    source = scan(cfg.data.train)
    check_count(len(source), f"--data.train {printable(cfg.data.train)!r} has")
    return SampledImages(source, cfg, images, labelled=False, balanced=True)


def check_count(images: int, which: str) -> None:
    """Raise ValueError for fewer than `FEWEST_COMPARED` images."""
    if images < FEWEST_COMPARED:
        raise ValueError(
            f"{which} {images} images, but a comparison needs {FEWEST_COMPARED}; give more by"
            " --data.train"
        )


def gathered(found: FeatureSet) -> tuple[Tensor, dict[str, Tensor]]:
    """Places and features (N, C) of all ranks' images, in their order, on rank 0; empty elsewhere.

    ValueError, on every rank, if the images that could be read are too few.
    """
    counts = dist.all_gather(torch.tensor(len(found.place_R)))
    check_count(int(counts.sum()), "of the images can be read:")
    missing = int(counts.max()) - len(found.place_R)
    place_WR = dist.gather_to_rank(F.pad(found.place_R, (0, missing), value=FILLER), 0)
    rows_WRC = {
        name: dist.gather_to_rank(F.pad(row_RC, (0, 0, 0, missing)), 0)
        for name, row_RC in found.cls.items()
    }
    if place_WR is None:
        return found.place_R[:0], {}
    place_N, order_N = place_WR.flatten().sort()
    order_N = order_N[place_N != FILLER]
    features = {name: x.flatten(0, 1)[order_N] for name, x in rows_WRC.items() if x is not None}
    return place_N[place_N != FILLER], features


def facts_of(model: Model, cost: TeacherCost, cfg: config.Config) -> Plain:
    """Facts of a teacher that no feature shows."""
    (row,) = (row for row in cfg.teachers if row.name == model.name)
    traced = outlined(replace(row, placement="replicate", micro=0), grid_of(cfg.student))
    return {
        "source": row.source,
        "summary": traced.summary,
        "size": model.size,
        "parameters": cost.parameters,
        "gflops": cost.flops / 1e9,
    }


def as_plain(found: Comparison, facts: Mapping[str, Plain], *, budget: float | None) -> Plain:
    """The comparison as JSON; a number that is not finite is null."""
    teachers = {
        name: facts[name] | {"tokens": {kind: asdict(x) for kind, x in of.items()}}
        for name, of in found.spectra.items()
    }
    labelled = None
    if found.labelled:
        rows = [asdict(row) | {"best": row.best} for row in found.labelled.classes]
        labelled = asdict(found.labelled) | {"classes": rows}
    plain = {
        "images": found.images,
        "teachers": teachers,
        "pairs": [asdict(pair) for pair in found.pairs],
        "labelled": labelled,
        "selection": asdict(found.selection)
        | {
            "budget": budget,
            "coverage": found.coverage,
            "knn": found.knn,
            "without": [asdict(row) for row in found.without],
        },
    }
    return finite(plain)


def finite(value: Any) -> Any:
    """Plain values with None in the place of numbers that are not finite, and lists of tuples."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(plain: Plain, out: Path) -> None:
    """Write the comparison and its picture to a folder, each atomically."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain, indent=1, allow_nan=False)
    files.write_atomic(out / run_files.COMPARISON, text + "\n")
    with files.open_atomic(out / run_files.COMPARISON_PICTURE) as stream:
        comparison_picture.draw(plain, stream)
