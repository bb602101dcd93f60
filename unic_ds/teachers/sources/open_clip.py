"""Teachers from open_clip: `open_clip:ARCH/TAG`, the visual tower before its projection to text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip import CLIP

from unic_ds import config
from unic_ds.config.overrides import nearest
from unic_ds.teachers import adapters, weight_files
from unic_ds.teachers.adapters import TeacherModel
from unic_ds.teachers.probe import first_line
from unic_ds.teachers.sources import hub
from unic_ds.teachers.sources.build import block_of, build, check_patch, vit_size
from unic_ds.teachers.sources.contract import Source
from unic_ds.teachers.sources.timm import stride_of, tower_of


def read(row: config.Teacher, grid: int) -> TeacherModel:
    """Published weights of the visual tower."""
    locate(row)
    with torch.device("meta"):
        outlined = build_outline(row, grid)  # what fails below is then the weights' fault
    return visual_tower(row, outlined.size, whole(row, outlined.size))


def whole(row: config.Teacher, size: int) -> CLIP:
    """The model with both towers and its weights, for images of `size` px."""
    weight_files.check(row, locate(row), "")
    arch, tag = row.parsed_source.model, row.parsed_source.tag
    try:
        model = open_clip.create_model(arch, pretrained=tag, force_image_size=size)
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:
        raise ValueError(
            f"teacher {row.name!r}: its weights do not fit {arch} ({first_line(exc)})"
        ) from exc
    return model


def outline(row: config.Teacher, grid: int) -> TeacherModel:
    """The visual tower without its weights, on meta."""
    published(row)
    with torch.device("meta"):
        return build_outline(row, grid)


def locate(row: config.Teacher) -> Path:
    """The weight file in the hub's or open_clip's cache."""
    return hub.locate(row, published(row))


def fetch(row: config.Teacher) -> None:
    """Download the weight file."""
    hub.fetch(row, published(row))


def published(row: config.Teacher) -> hub.Published:
    """The weight file that open_clip publishes for a tag; ValueError for unknown names."""
    arch, tag = row.parsed_source.model, row.parsed_source.tag
    if arch not in open_clip.list_models():
        near = nearest(arch, open_clip.list_models())
        raise ValueError(f"teachers.{row.name}.source names no open_clip model: {arch!r}{near}")
    cfg = open_clip.get_pretrained_cfg(arch, tag)
    if not cfg:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise ValueError(
            f"teachers.{row.name}.source: open_clip has no {tag!r}; of {arch} it has {known}"
        )
    repo, _, name = cfg.get("hf_hub", "").rpartition("/")
    names = hub.safe_first(name, "open_clip_pytorch_model.bin", "open_clip_model.safetensors")
    return hub.Published(repo, None, names, cfg.get("url", ""), Path("~/.cache/clip").expanduser())


def own_size(row: config.Teacher) -> int:
    """Side in pixels of the images that the tower's weights were trained on."""
    published(row)
    return int(open_clip.get_model_config(row.parsed_source.model)["vision_cfg"]["image_size"])


def build_outline(row: config.Teacher, grid: int) -> TeacherModel:
    """The visual tower without its weights."""
    arch = row.parsed_source.model
    cfg = open_clip.get_model_config(arch)
    size, text = image_size(row, grid, cfg["vision_cfg"]), cfg["text_cfg"].get("hf_model_name")
    try:
        model = build(row, open_clip.create_model, arch, force_image_size=size, device="meta")
    except ValueError as error:
        if not text:
            raise
        raise ValueError(
            f"{error}; its text tower is {text} of transformers: pip install transformers, then hf"
            f" download {text}"
        ) from error
    return visual_tower(row, size, model)


def visual_tower(row: config.Teacher, size: int, model: CLIP) -> TeacherModel:
    """The visual tower of an open_clip model: its own ViT or ResNet, or a timm trunk."""
    visual = model.visual
    wants = open_clip.get_model_preprocess_cfg(model)
    tower: adapters.Tower
    patch: int
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        block = block_of(row, len(visual.transformer.resblocks))
        tower, patch = adapters.ClipViT(visual, block), visual.patch_size[0]
    elif isinstance(visual, open_clip.timm_model.TimmModel):
        tower, patch = tower_of(row, visual.trunk)
    else:
        block_of(row, 0)
        tower, patch = adapters.ClipMap(visual), 0
    return TeacherModel(tower, size, patch, tuple(wants["mean"]), tuple(wants["std"]))


def image_size(row: config.Teacher, grid: int, vision: dict[str, Any]) -> int:
    """The image side for an open_clip tower, from its own config."""
    patch = vision.get("patch_size", 16)
    name = vision.get("timm_model_name")
    if name:
        with torch.device("meta"):
            patch = stride_of(build(row, timm.create_model, name))
    elif isinstance(vision["layers"], list):  # ModifiedResNet
        patch = 0
        if row.size not in (0, vision["image_size"]):
            raise ValueError(
                f"teachers.{row.name}.size must be 0 or the tower's own {vision['image_size']}, got"
                f" {row.size}: its attention pool has positions for that side alone"
            )
    check_patch(row, patch, "this tower")
    own = vision["image_size"]
    return vit_size(row, grid, patch, own) if patch else row.size or own


SOURCE = Source(
    read=read,
    outline=outline,
    locate=locate,
    fetch=fetch,
    own_size=own_size,
    published=published,
)
