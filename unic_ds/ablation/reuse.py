"""Reuse of runs: a run that is there counts if it was started as the grid asks for now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unic_ds import files
from unic_ds.ablation import shared_features
from unic_ds.ablation.cells import Run, Study
from unic_ds.config import Config, ds_config, overrides, recipes
from unic_ds.config.option import SHOWN
from unic_ds.files.documents import read_json
from unic_ds.files.printable import printable

FILE = "started_with.json"
"""File of a run's folder: what it was started with besides its config.yaml."""

SPEED = (
    *("recipe", "cache", "kernels", "eval.", "probe."),
    *("student.activation_checkpointing", "ladder.activation_checkpointing"),
    *("data.backend", "data.threads", "data.readers", "data.prefetch", "data.tokens"),
    *("run.log_every", "run.track", "run.save_minutes", "run.save_every", "run.keep_"),
    *("run.best_by", "run.compile", "run.deterministic", "run.stop_", "run.extend"),
    *("run.hang_timeout", "run.stall_timeout"),
)
"""Beginnings of the settings that do not decide a student: speed, memory, records, evaluation."""

SPEED_OF_TEACHER = ("placement", "micro")


def check(study: Study, run: Run) -> None:
    """Raise ValueError, which names what differs, if a run was started in another way.

    A folder without `FILE`, as `unic-ds train` leaves it, is known by its settings alone.
    """
    settings = recipes.read(run.folder / "config.yaml")
    there = settings_facts(settings, run, study)
    here = settings_facts(study.config(run.cell, run.seed), run, study)
    if (file := run.folder / FILE).is_file():
        there |= read_started(file)
        here |= overrides.flatten(started_with(study, run))
    keys = sorted(there.keys() | here.keys())
    pairs = [(key, there.get(key, "absent"), here.get(key, "absent")) for key in keys]
    differ = [f"{key} was {was!r}, now {now!r}" for key, was, now in pairs if was != now]
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ValueError(
            f"{str(run.folder)!r} holds another run"
            f" ({printable('; '.join(differ[:5]), 5 * SHOWN)}{more}); choose another --out"
        )


def settings_facts(cfg: Config, run: Run, study: Study) -> dict[str, str]:
    """The settings that decide a student; the path of a run of the grid may change."""
    texts = overrides.flatten(overrides.to_dict(cfg))
    speed = {f"teachers.{row.name}.{key}" for row in cfg.teachers for key in SPEED_OF_TEACHER}
    kept = {k: v for k, v in texts.items() if not k.startswith(SPEED) and k not in speed}
    if run.cell in study.teaches_itself:
        kept |= {f"teachers.{row.name}.source": row.parsed_source.science for row in cfg.teachers}
    return kept | {"teachers": ",".join(row.name for row in cfg.teachers)}  # in their order


def started_with(study: Study, run: Run) -> dict[str, Any]:
    """The content of `FILE`: the ds_config, and the images that the teachers see."""
    cfg = study.config(run.cell, run.seed)
    return {"ds_config": ds_config.read(study.ds_config), "views": views_of(study, run, cfg)}


def views_of(study: Study, run: Run, cfg: Config) -> str:
    """The number of cached views, `live` for new ones in each epoch, or whose cache it is."""
    if not cfg.cache:
        return "live" if shared_features.live_reason(study, run.cell, cfg) else str(study.views)
    try:
        return f"of a cache whose manifest has SHA-256 {files.sha256(manifest_of(cfg))[:16]}"
    except OSError:  # the training reports it
        return "of a cache without a manifest"


def manifest_of(cfg: Config) -> Path:
    """The manifest of the feature cache that the settings name."""
    return Path(cfg.cache) / "manifest.json"


def record(study: Study, run: Run) -> None:
    """Write `FILE` before a training starts."""
    text = json.dumps(started_with(study, run), indent=1)
    files.write_atomic(run.folder / FILE, text + "\n")


def read_started(file: Path) -> dict[str, str]:
    """The facts of `FILE`; ValueError if it is damaged."""
    try:
        return overrides.flatten(read_json(file))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}); remove it, or choose another --out"
        ) from None
