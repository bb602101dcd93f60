"""Check of a recipe's teachers on images, for `unic-ds teachers check`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any, Literal

from unic_ds import config, data, demo, dist
from unic_ds.models.encoder import grid_of
from unic_ds.teachers import quantisation, teacher_set
from unic_ds.training import setup

EightBits = Literal["int8", "fp8", "int8_dynamic", "fp8_dynamic"]


def describe(cfg: config.Config) -> list[dict[str, Any]]:
    """Run an image through each teacher; a row per teacher about its output."""
    return teacher_set.describe(cfg.teachers, grid=grid_of(cfg.student), device=dist.device())


def agreement(cfg: config.Config, precision: EightBits) -> list[dict[str, Any]]:
    """Measure the cosine of each teacher's tokens in eight bits to those in bf16; a row each."""
    rows = tuple(replace(row, precision=precision, placement="replicate") for row in cfg.teachers)
    sample, images = images_to_compare(cfg)
    found = teacher_set.fidelities(
        rows, grid=grid_of(cfg.student), device=dist.device(), sample=sample
    )
    return [row | {"images": images} for row in found]


def refuse(rows: Sequence[dict[str, Any]]) -> None:
    """RuntimeError for tokens that are not finite, or too far from those in bf16."""
    if wrong := [row["name"] for row in rows if not row.get("finite", True)]:
        raise RuntimeError(f"tokens of {', '.join(wrong)} are not finite; leave such teachers out")
    for row in rows:
        if "images" in row:
            quantisation.check_agreement(row["name"], row["precision"], row)


def images_to_compare(cfg: config.Config) -> tuple[quantisation.Sample, str]:
    """(function from a side in pixels to images for the check, name of the images)."""
    source = cfg.data.train
    if not source and demo.ready():
        source = str(demo.root() / demo.PARTS[0])
    if source:
        with redirect_stdout(sys.stderr):  # lines of a scan do not belong in a table or in JSON
            return setup.sample_images(cfg, data.scan(source)), source
    return setup.noise_images, "noise, for there are no images; give --data.train"
