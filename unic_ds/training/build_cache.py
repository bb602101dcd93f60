"""Store the teachers' features of augmented views, for training that does not run them.

The ranks of a launcher divide the work by files. A complete file is not written again, so the same
command resumes after it was stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from unic_ds import config, data, dist, files
from unic_ds.harness.image_sets import find_images
from unic_ds.models.encoder import grid_of
from unic_ds.process import console
from unic_ds.teachers import cache
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import Tokens
from unic_ds.training.setup import augmentation_key, sample_images

ASK_OVER = 100e9  # bytes that are not written without --yes


def store(cfg: config.Config, out: Path, *, views: int, dtype: str, yes: bool, batch: int) -> None:
    """Write the feature cache of a recipe's teachers to `out`; every rank calls it.

    ValueError if it would not fit, is larger than `ASK_OVER` without `yes`, or the folder holds
    something else.
    """
    dist.start()
    train, _ = find_images(cfg)
    teachers = TeacherSet(
        replicated(cfg.teachers),
        grid=grid_of(cfg.student),
        standardise=cfg.standardise,
        device=dist.device(),
        sample=sample_images(cfg, train),
    )
    manifest = dist.on_rank_0(lambda: describe(cfg, train, teachers, views, dtype))
    layout = cache.layout_of(out, manifest)
    check(layout, manifest, yes)
    dist.barrier()  # all ranks have read the folder before rank 0 writes to it
    missing = layout.missing()
    if dist.rank() == 0 and missing:
        out.mkdir(parents=True, exist_ok=True)
        write_manifest(out, manifest)
    dist.barrier()
    assigned, start = missing[dist.rank() :: dist.world()], time.monotonic()
    plan = data.drawn(
        train,
        cfg.data,
        seed=cfg.seed,
        sizes=(cfg.student.size, *teachers.sizes),
        batch=batch,
        plan=assigned,
        device=dist.device(),
    )
    bar = console.track(assigned, len(assigned), "teachers' features")
    for (view, span), tokens in zip(bar, features_of(plan, teachers), strict=True):
        for name in layout.widths:
            layout.write(name, view, span, [batch[name] for batch in tokens])
    dist.barrier()
    if dist.rank() == 0 and missing:
        write_manifest(out, manifest | {"whole": True})
    dist.barrier()
    count, seconds = sum(len(span) for _, span in missing), time.monotonic() - start
    console.say(
        f"{out}: {count} views stored in {seconds:.0f} s; train with --teachers.cache {out}"
    )


def replicated(rows: tuple[config.Teacher, ...]) -> tuple[config.Teacher, ...]:
    """Teachers that are not sharded over several ranks, since each rank writes other files."""
    if dist.world() == 1:
        return rows
    return tuple(replace(row, placement="replicate") for row in rows)


def describe(
    cfg: config.Config, train: data.Source, teachers: TeacherSet, views: int, dtype: str
) -> dict[str, Any]:
    """The manifest of a cache that is not complete yet."""
    grid = grid_of(cfg.student)
    facts = teachers.manifest()
    manifest = {
        "format": 1,
        "whole": False,
        "seed": cfg.seed,
        "views": views,
        "dtype": dtype,
        "samples": len(train),
        "tokens": grid * grid,
        "chunk": cache.CHUNK,
        "draws": augmentation_key(cfg, train),
        "teachers": {row.name: facts[row.name] | cache.own_facts(row) for row in cfg.teachers},
    }
    return json.loads(json.dumps(manifest))  # with the types that its file will have


def features_of(
    plan: Iterator[list[data.Batch]], teachers: TeacherSet
) -> Iterator[list[dict[str, Tokens]]]:
    """The teachers' tokens of every file's batches."""
    for batches in plan:
        yield [teachers.features(batch.images) for batch in batches]


def check(layout: cache.Layout, manifest: dict[str, Any], yes: bool) -> None:
    """Print the size of the cache; ValueError if it cannot or should not be written."""
    folder = layout.folder
    existing = cache.read_manifest(folder)
    if existing is not None:
        cache.check_manifest(folder, existing)
        if other := cache.differing(existing, manifest):
            raise ValueError(
                f"{str(folder)!r} holds a feature cache with other {', '.join(other)}; choose"
                " another folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} holds something else; choose another folder")
    total = left = layout.total()
    if existing is not None:
        missing = layout.missing()
        left = sum(layout.size(name, len(span)) for name in layout.widths for _, span in missing)
    console.say(
        f"{layout.samples} images x {layout.views} views x {len(layout.widths)} teachers in"
        f" {layout.dtype}: {total / 1e9:.2f} GB, {left / 1e9:.2f} GB to write"
    )
    free = shutil.disk_usage(files.nearest_existing(folder)).free
    if left > free:
        raise ValueError(
            f"{left / 1e9:.1f} GB of features do not fit in {str(folder)!r} with {free / 1e9:.1f}"
            " GB free; take fewer --views, --dtype int8 or another folder"
        )
    if left > ASK_OVER and not yes:
        raise ValueError(f"{left / 1e9:.0f} GB would be written; add --yes if that is meant")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest atomically."""
    files.write_atomic(folder / cache.MANIFEST, json.dumps(manifest, indent=1) + "\n")
