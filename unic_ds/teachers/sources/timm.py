"""Teachers from timm: `timm:NAME`, published weights from the hub's cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from unic_ds import config
from unic_ds.config.overrides import nearest
from unic_ds.teachers import adapters, weight_files
from unic_ds.teachers.adapters import TeacherModel
from unic_ds.teachers.probe import first_line
from unic_ds.teachers.sources import hub
from unic_ds.teachers.sources.build import block_of, build, check_patch, vit_size
from unic_ds.teachers.sources.contract import Source


def read(row: config.Teacher, grid: int) -> TeacherModel:
    """Published weights, loaded strictly, without their classifier."""
    return beheaded(row, *whole(row, grid))


def whole(row: config.Teacher, grid: int) -> tuple[int, nn.Module]:
    """(image side, the model with its classifier) of published weights, loaded strictly."""
    name = row.parsed_source.model
    weight_files.check(row, locate(row), name)
    return with_weights(row, grid, name, {})


def outline(row: config.Teacher, grid: int) -> TeacherModel:
    """The model without its weights, on meta."""
    published(row)
    return without_weights(row, grid, row.parsed_source.model)


def locate(row: config.Teacher) -> Path:
    """The weight file in the hub's cache."""
    return hub.locate(row, published(row))


def fetch(row: config.Teacher) -> None:
    """Download the weight file."""
    hub.fetch(row, published(row))


def published(row: config.Teacher) -> hub.Published:
    """The weight file that timm publishes for a name; ValueError for a name without weights."""
    name, arch = row.parsed_source.model, row.parsed_source.arch
    if not timm.is_model(arch):
        near = nearest(arch, timm.list_models())
        raise ValueError(f"teachers.{row.name}.source names no timm model: {arch!r}{near}")
    tagged = timm.list_pretrained(f"{arch}.*")
    if not tagged or ("." in name and name not in tagged):
        known = ", ".join(tagged) or "none"
        raise ValueError(
            f"teachers.{row.name}.source: timm has no weights {name!r}; of {arch} it has {known}"
        )
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    repo, _, revision = (cfg.hf_hub_id or "").partition("@")
    names = hub.safe_first(cfg.hf_hub_filename or "", "pytorch_model.bin", "model.safetensors")
    url = cfg.url[0] if isinstance(cfg.url, (tuple, list)) else cfg.url or ""
    return hub.Published(
        repo, revision or None, names, url, Path(torch.hub.get_dir()) / "checkpoints"
    )


def own_size(row: config.Teacher) -> int:
    """Side in pixels of the images that timm has a model's weights for."""
    check_arch(row, row.parsed_source.model)
    cfg = timm.get_pretrained_cfg(row.parsed_source.model)
    return cfg.input_size[-1] if cfg else 0


def check_arch(row: config.Teacher, arch: str) -> None:
    """ValueError unless timm has an architecture."""
    if not timm.is_model(arch.split(".")[0]):
        near = nearest(arch, timm.list_models())
        raise ValueError(f"teachers.{row.name}.source: timm has no arch {arch!r}{near}")


def without_weights(row: config.Teacher, grid: int, name: str) -> TeacherModel:
    """A timm model on meta, for the side that row, grid or its config asks for."""
    with torch.device("meta"):
        size, _, model = outline_for_size(row, grid, name)
        return beheaded(row, size, model)


def with_weights(
    row: config.Teacher, grid: int, name: str, overlay: dict[str, Any], **options: Any
) -> tuple[int, nn.Module]:
    """(image side, a timm model with weights for it); row, grid or its config ask for the side."""
    with torch.device("meta"):  # what fails after this is the weights' fault
        size, shape, _ = outline_for_size(row, grid, name)
    try:
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **shape, **options
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # timm's filters take foreign weights apart, and fail in any way
        raise ValueError(
            f"teacher {row.name!r}: its weights do not fit {name} ({first_line(exc)})"
        ) from exc
    return size, model


def beheaded(row: config.Teacher, size: int, model: nn.Module) -> TeacherModel:
    """A timm model without its classifier; vision encoders of language models have none."""
    if hasattr(model, "reset_classifier"):
        cast(VisionTransformer, model).reset_classifier(0)
    wants = timm.data.resolve_model_data_config(model)
    tower, patch = tower_of(row, model)
    licence = pretrained_cfg(model).get("license") or ""
    return TeacherModel(tower, size, patch, wants["mean"], wants["std"], licence)


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """timm's description of a model's published weights."""
    return vars(model)["pretrained_cfg"]


def tower_of(row: config.Teacher, model: nn.Module) -> tuple[adapters.Tower, int]:
    """(tower, pixels a patch token covers) of a timm model; 0 pixels if its features are a map."""
    stride = stride_of(model)
    if stride:
        vit = cast(VisionTransformer, model)
        return adapters.TimmViT(vit, block_of(row, len(vit.blocks))), stride
    block = block_of(row, len(getattr(model, "feature_info", ())))
    return adapters.TimmMap(cast(adapters.MapModel, model), block), 0


def outline_for_size(
    row: config.Teacher, grid: int, name: str
) -> tuple[int, dict[str, Any], nn.Module]:
    """(image side, constructor options for that side, the model built with them).

    A model that takes its own side alone has that, unless the row asks for another one. ValueError
    if there is no such model, or it does not take the row's side.
    """
    own = build(row, timm.create_model, name)
    size, shape = timm_shape(row, grid, own)
    try:
        return size, shape, resampled(row, name, own, size, shape)
    except ValueError:
        if row.size or size == own_side(own):
            raise
    return outline_for_size(replace(row, size=own_side(own)), grid, name)


def resampled(
    row: config.Teacher, name: str, own: nn.Module, size: int, shape: dict[str, Any]
) -> nn.Module:
    """The model `own` built for another side; ValueError if its weights cannot be resampled."""
    model = build(row, timm.create_model, name, **shape)
    state, wants = own.state_dict(), model.state_dict()
    same = all(key in state and state[key].shape == x.shape for key, x in wants.items())
    if same or hasattr(model, "set_input_size"):
        return model
    overlay = {"state_dict": state, "custom_load": False}
    try:  # timm's loader refuses weights that it cannot resample
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **shape)
    except Exception as exc:
        raise ValueError(
            f"teachers.{row.name}.size must be {own_side(own)}, got {size}: timm cannot resample"
            f" the positions of {name} (its map is then resized to the student's grid)"
        ) from exc
    return model


def own_side(model: nn.Module) -> int:
    """Side in pixels of the images that a timm model's weights were trained on."""
    return int(pretrained_cfg(model)["input_size"][-1])


def stride_of(model: nn.Module) -> int:
    """Pixels that a patch token of a timm ViT covers; 0 if the model is none.

    A ViT keeps one sequence of patch tokens behind `num_prefix_tokens` others. Its stride is that
    of its patches times that of the convolutions before them (hybrids, ViTamin, MobileCLIP).
    """
    embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    patch = getattr(embed, "patch_size", None)
    if embed is None or not isinstance(patch, tuple) or not hasattr(model, "num_prefix_tokens"):
        return 0
    if not hasattr(model, "blocks"):
        return 0
    return int(embed.feat_ratio() if hasattr(embed, "feat_ratio") else patch[0])


def timm_shape(row: config.Teacher, grid: int, outline: nn.Module) -> tuple[int, dict[str, Any]]:
    """(image side, constructor options for that side)."""
    stride, own = stride_of(outline), own_side(outline)
    if not stride:
        check_patch(row, 0, type(outline).__name__)
        size = row.size or own
        return size, {"img_size": size} if pretrained_cfg(outline).get("fixed_input_size") else {}
    if hasattr(outline, "embeds"):  # NaFlexViT, which takes any side
        check_patch(row, stride, type(outline).__name__)
        return vit_size(row, grid, stride, own), {}
    if not isinstance(outline.patch_embed, timm.layers.PatchEmbed):
        check_patch(row, stride, type(outline).__name__)
    patch = row.patch or stride
    size = vit_size(row, grid, patch, own)
    return size, {"img_size": size} | ({"patch_size": patch} if patch != stride else {})


SOURCE = Source(
    read=read,
    outline=outline,
    locate=locate,
    fetch=fetch,
    own_size=own_size,
    published=published,
)
