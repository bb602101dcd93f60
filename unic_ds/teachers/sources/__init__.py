"""Kinds of teacher source; functions that read, outline, locate and fetch a row's model.

To add a kind, write a module with a `Source` (see `contract`) and give it a name in `SOURCES`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from timm.layers import set_fused_attn
from torch import Tensor

from unic_ds import config
from unic_ds.config.models import check_scale
from unic_ds.teachers import probe, weight_files
from unic_ds.teachers.adapters import TeacherModel
from unic_ds.teachers.sources.contract import Source
from unic_ds.teachers.sources.file import SOURCE as FILE
from unic_ds.teachers.sources.open_clip import SOURCE as OPEN_CLIP
from unic_ds.teachers.sources.python import SOURCE as PYTHON
from unic_ds.teachers.sources.run import SOURCE as RUN
from unic_ds.teachers.sources.timm import SOURCE as TIMM
from unic_ds.tokens import Tokens

SOURCES: dict[str, Source] = {
    "timm": TIMM,
    "open_clip": OPEN_CLIP,
    "file": FILE,
    "run": RUN,
    "python": PYTHON,
}


def source_of(row: config.Teacher) -> Source:
    """The kind of a row's source; ValueError if it is not in `SOURCES`."""
    kind = row.parsed_source.kind
    if kind not in SOURCES:
        known = ", ".join(f"{name}:" for name in SOURCES)
        raise ValueError(
            f"teachers.{row.name}.source must begin with one of {known}, got {row.source!r}"
        )
    return SOURCES[kind]


def read(row: config.Teacher, grid: int) -> TeacherModel:
    """A row of a recipe, with weights, on the CPU; the student's patch grid is `grid` x `grid`.

    ValueError for a user's mistake: an unknown name, missing or foreign weights, a size that does
    not fit.
    """
    fuse_attention()
    model = source_of(row).read(row, grid)
    weight_files.refuse_not_finite(row, model.tower, buffers=has_outline(row))
    return model


def fuse_attention() -> None:
    """Have timm use scaled_dot_product_attention in Swin's windows too, which is opt-in."""
    set_fused_attn(enable=True, experimental=True)


def has_outline(row: config.Teacher) -> bool:
    """True if the model can be built without its weights, by known code."""
    return source_of(row).outline is not None


def outline(row: config.Teacher, *, grid: int) -> TeacherModel:
    """A model without its weights, on meta, that gave tokens of two images. ValueError as `read`.

    A kind of source that has no outline is read, weights and all.
    """
    in_full = not has_outline(row)
    with torch.random.fork_rng(devices=[], enabled=in_full):  # the run draws the same
        model = skeleton(row, grid)
    preprocessing(row, model)
    dtype = probe.DTYPE[row.precision]
    model.tower.to(dtype).requires_grad_(False).eval()

    def encode(image_B3HW: Tensor) -> Tokens:
        return model.tower(image_B3HW.to(dtype))

    device = torch.device("cpu" if in_full else "meta")
    probe.measure(row, model.size, encode, device=device, single=in_full)
    return model


def skeleton(row: config.Teacher, grid: int) -> TeacherModel:
    """A model without its weights, on meta, that has not been run. ValueError as `read`."""
    fuse_attention()
    source = source_of(row)
    return (source.outline or source.read)(row, grid)


def architecture_facts(row: config.Teacher, grid: int) -> dict[str, int | str]:
    """Facts of a teacher's tokens that its architecture decides: image side, kind of summary.

    Empty if it cannot be built here without its weights.
    """
    if not has_outline(row):
        return {}
    try:
        model = skeleton(row, grid)
    except ValueError:
        return {}
    return {"size": model.size, "cls": model.tower.summary}


def preprocessing(
    row: config.Teacher, model: TeacherModel
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of a teacher's images: the row's, or else its source's.

    ValueError for values on a scale of 0 to 255.
    """
    mean, std = tuple(row.mean or model.mean), tuple(row.std or model.std)
    check_scale(mean, std, f"teachers.{row.name}")
    return mean, std


def locate(row: config.Teacher) -> Path | None:
    """The teacher's weight file on this machine, without network; None if its kind has none.

    ValueError, with the remedy, unless it is there.
    """
    find = source_of(row).locate
    return find(row) if find else None


def own_size(row: config.Teacher) -> int:
    """Side in pixels of the images that a source's weights were trained on, 0 if unknown.

    ValueError for an unknown name.
    """
    find = source_of(row).own_size
    return find(row) if find else 0


def hub_repository(row: config.Teacher) -> str:
    """The hub repository that publishes a teacher's weights, empty if there is none or unknown."""
    find = SOURCES[row.parsed_source.kind].published if row.parsed_source.kind in SOURCES else None
    try:
        return find(row).repo if find else ""
    except ValueError:  # a library of another version does not know the name
        return ""


def check_weights(row: config.Teacher, grid: int) -> None:
    """ValueError if the names or shapes in a weight file do not fit the architecture."""
    check = source_of(row).check_weights
    if check:
        check(row, grid)


def fetch(row: config.Teacher) -> dict[str, str | int]:
    """Download a teacher's weights unless they are on this machine; returns `facts`.

    ValueError for weights that do not exist or are gated, RuntimeError if the network fails.
    """
    download = source_of(row).fetch
    if download:
        download(row)
    return facts(row)


def facts(row: config.Teacher) -> dict[str, str | int]:
    """name, source, path, bytes and hashes of the weight file (empty if there is none)."""
    path = locate(row)
    if path is None:
        return {"name": row.name, "source": row.source, "path": "", "bytes": 0, "sha256": ""}
    found: dict[str, str | int] = {"path": str(path), "bytes": path.stat().st_size}
    return {"name": row.name, "source": row.source} | found | weight_files.hashes(path)
