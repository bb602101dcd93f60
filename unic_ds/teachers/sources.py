"""Reads a teacher of each kind of source: its tower, with weights, and how it wants its images."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from unic_ds import config
from unic_ds.files import encodable
from unic_ds.override import nearest
from unic_ds.printable import printable
from unic_ds.teachers import towers, weights
from unic_ds.tensor_files import Safetensors

UNFIT = (
    *(RuntimeError, AssertionError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, MemoryError),
)
"""Errors of libraries that are given the weights of another model."""
MOST_CLASSES = 1_000_000
"""Outputs of the largest classifier in a weight file: it is built before the weights are read."""


class Source(NamedTuple):
    """What a kind of source knows of a teacher: its tower and the preprocessing it wants."""

    tower: Any  # an nn.Module with has_cls: normalised images -> Tokens
    size: int  # side of the images in pixels
    patch: int  # pixels a patch token covers; 0: the tower does not say
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str = ""


def read(row: config.Teacher, grid: int) -> Source:
    """A row of a recipe, with weights, on the CPU; the student's patch grid is `grid` x `grid`.

    ValueError for what a user can cause: an unknown name, missing or foreign weights, a size that
    does not fit.
    """
    fuse_attention()
    source = BUILD[row.source.partition(":")[0]](row, grid)
    weights.refuse_not_finite(row, source.tower)
    return source


def fuse_attention() -> None:
    """Have timm use scaled_dot_product_attention also where it asks to be told: Swin's windows."""
    timm.layers.set_fused_attn(enable=True, experimental=True)


def outline(row: config.Teacher, *, grid: int) -> Source:
    """A teacher without its weights, on meta: what there is to plan with. ValueError as `read`.

    A python: source is called as it is, weights and all.
    """
    fuse_attention()
    kind, _, rest = row.source.partition(":")
    if kind == "python":
        return from_python(row, grid)
    with torch.device("meta"):
        if kind == "open_clip":
            return clip_outline(row, grid, rest.partition("/")[0])
        arch = rest.rpartition("#arch=")[2]
        if not timm.is_model(arch.split(".")[0]):
            near = nearest(arch, timm.list_models())
            raise ValueError(f"teachers.{row.name}.source: timm has no model {arch!r}{near}")
        size, shape = timm_shape(row, grid, timm.create_model(arch, pretrained=False))
        model: Any = timm.create_model(arch, pretrained=False, **shape)
        model.reset_classifier(0)
        wants = timm.data.resolve_model_data_config(model)
        tower, patch = timm_tower(row, model)
    return Source(tower, size, patch, wants["mean"], wants["std"])


def clip_outline(row: config.Teacher, grid: int, arch: str) -> Source:
    """An open_clip tower without its weights."""
    import open_clip

    found = open_clip.get_model_config(arch)
    if found is None:
        near = nearest(arch, open_clip.list_models())
        raise ValueError(f"teachers.{row.name}.source: open_clip has no model {arch!r}{near}")
    size = clip_size(row, grid, found["vision_cfg"])
    model = open_clip.create_model(arch, force_image_size=size, device="meta")
    return clip_source(row, size, model)


def from_timm(row: config.Teacher, grid: int) -> Source:
    """`timm:NAME`: published weights from the hub's cache, loaded strictly, then beheaded."""
    weights.check(row)
    return timm_source(row, grid, row.source.removeprefix("timm:"), {})


def from_file(row: config.Teacher, grid: int) -> Source:
    """`file:PATH#arch=NAME`: local safetensors or weights-only .pth, through timm's own filters."""
    path = weights.locate(row)
    assert path is not None
    arch = row.source.rpartition("#arch=")[2]
    if not timm.is_model(arch.split(".")[0]):
        near = nearest(arch, timm.list_models())
        raise ValueError(f"teachers.{row.name}.source: timm has no arch {arch!r}{near}")
    classes = classes_of(row, path, arch)
    # The head is built as the file has it: timm is strict only where their classes agree.
    overlay = {
        "file": str(encodable(path)),
        "num_classes": classes,
        "label_offset": 0,
        "custom_load": False,
    }
    source = timm_source(row, grid, arch, overlay, num_classes=classes)
    return source._replace(licence=licence_of(path))


def classes_of(row: config.Teacher, path: Path, arch: str) -> int:
    """Classes of the classifier in a weight file (0: none); ValueError where it has no weights."""
    cfg = timm.get_pretrained_cfg(arch)
    names = (cfg and cfg.classifier) or ()
    try:
        state = weights.state_of(path)
        wrong = weights.foreign(state) or weights.integers(state, arch) or weights.patches(state)
        if wrong:
            raise ValueError(f"{str(path)!r} holds no weights of {arch}: {wrong}")
    except ValueError as error:
        raise ValueError(f"teacher {row.name!r}: {error}; give it as safetensors") from None
    named = [f"{name}.weight" for name in ([names] if isinstance(names, str) else names)]
    heads = [state[name] for name in named if name in state]
    if any(head.ndim < 2 or not 0 < head.shape[0] <= MOST_CLASSES for head in heads):
        shapes = ", ".join(str(tuple(head.shape)) for head in heads)
        raise ValueError(
            f"teacher {row.name!r}: {str(path)!r} has a classifier of shape {shapes}, not [classes,"
            f" channels] with at most {MOST_CLASSES} classes; remove it from the file"
        )
    return heads[0].shape[0] if heads else 0


def licence_of(path: Path) -> str:
    """The `licence` entry of a safetensors file's metadata, or nothing."""
    if path.suffix != ".safetensors":
        return ""
    return printable(Safetensors(path).metadata.get("licence", ""))


def timm_source(
    row: config.Teacher, grid: int, name: str, overlay: dict[str, Any], **options: Any
) -> Source:
    """A timm model with weights, built for the side that row, grid or its config asks for."""
    with torch.device("meta"):
        outline = timm.create_model(name, pretrained=False)
    size, shape = timm_shape(row, grid, outline)
    model: Any
    try:
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **shape, **options
        )
    except UNFIT as exc:
        raise ValueError(
            f"teacher {row.name!r}: its weights do not fit {name} ({first_line(exc)})"
        ) from exc
    model.reset_classifier(0)
    wants = timm.data.resolve_model_data_config(model)
    tower, patch = timm_tower(row, model)
    licence = model.pretrained_cfg.get("license") or ""
    return Source(tower, size, patch, wants["mean"], wants["std"], licence)


def is_vit(model: Any) -> bool:
    """Whether a timm model keeps one sequence of patch tokens behind `num_prefix_tokens` others."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return (
        isinstance(patch, tuple)
        and hasattr(model, "num_prefix_tokens")
        and hasattr(model, "blocks")
    )


def timm_shape(row: config.Teacher, grid: int, outline: Any) -> tuple[int, dict[str, Any]]:
    """(image side, constructor options that make the model take it)."""
    if is_vit(outline):
        patch = row.patch or outline.patch_embed.patch_size[0]
        size = vit_size(row, grid, patch)
        return size, {"img_size": size} | ({"patch_size": patch} if row.patch else {})
    if row.patch:
        raise ValueError(f"teachers.{row.name}.patch must be 0: {type(outline).__name__} is no ViT")
    size = row.size or outline.pretrained_cfg["input_size"][-1]
    return size, {"img_size": size} if outline.pretrained_cfg.get("fixed_input_size") else {}


def vit_size(row: config.Teacher, grid: int, patch: int) -> int:
    """The image side of a ViT: the row's, or what makes the grids agree (method: section 1)."""
    size = row.size or grid * patch
    if size % patch:
        raise ValueError(
            f"teachers.{row.name}.size must be a multiple of its patch {patch}, got {size}"
        )
    return size


def timm_tower(row: config.Teacher, model: Any) -> tuple[nn.Module, int]:
    """(tower, pixels a patch token covers) of a timm model; 0 pixels where it gives a map."""
    if is_vit(model):
        block = block_of(row, len(model.blocks))
        return towers.TimmViT(model, block), model.patch_embed.patch_size[0]
    return towers.TimmMap(model, block_of(row, len(model.feature_info))), 0


def block_of(row: config.Teacher, count: int) -> int:
    """The block (or stage) that tokens are read after, -1 for the output.

    ValueError where the row asks for one that a model of `count` lacks.
    """
    if row.block == "output":
        return -1
    block = (count - 1) // 2 if row.block == "middle" else int(row.block)
    if not 0 <= block < count:
        want = f"output, middle or below {count}" if count else "output for this kind of model"
        raise ValueError(f"teachers.{row.name}.block must be {want}, got {row.block}")
    return block


def from_clip(row: config.Teacher, grid: int) -> Source:
    """`open_clip:ARCH/TAG`: the visual tower, before its projection to the text space."""
    import open_clip

    weights.check(row)
    arch, _, tag = row.source.removeprefix("open_clip:").partition("/")
    size = clip_size(row, grid, open_clip.get_model_config(arch)["vision_cfg"])
    try:
        model = open_clip.create_model(arch, pretrained=tag, force_image_size=size)
    except UNFIT as exc:
        raise ValueError(
            f"teacher {row.name!r}: its weights do not fit {arch} ({first_line(exc)})"
        ) from exc
    return clip_source(row, size, model)


def clip_source(row: config.Teacher, size: int, model: Any) -> Source:
    """The visual tower of an open_clip model: its own ViT or ResNet, or a timm trunk."""
    import open_clip

    visual: Any = model.visual
    wants = open_clip.get_model_preprocess_cfg(model)
    tower: nn.Module
    patch: int
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        block = block_of(row, len(visual.transformer.resblocks))
        tower, patch = towers.ClipViT(visual, block), visual.patch_size[0]
    elif isinstance(visual, open_clip.timm_model.TimmModel):
        tower, patch = timm_tower(row, visual.trunk)
    else:
        block_of(row, 0)
        tower, patch = towers.ClipMap(visual), 0
    return Source(tower, size, patch, tuple(wants["mean"]), tuple(wants["std"]))


def clip_size(row: config.Teacher, grid: int, vision: dict[str, Any]) -> int:
    """The image side for an open_clip tower, from its own config."""
    patch = vision.get("patch_size", 16)
    name = vision.get("timm_model_name")
    if name:
        with torch.device("meta"):
            outline: Any = timm.create_model(name, pretrained=False)
        patch = outline.patch_embed.patch_size[0] if is_vit(outline) else 0
    elif isinstance(vision["layers"], list):  # ModifiedResNet
        patch = 0
    if row.patch not in (0, patch):
        raise ValueError(
            f"teachers.{row.name}.patch must be 0 or the tower's own {patch}, got {row.patch}"
        )
    return vit_size(row, grid, patch) if patch else row.size or vision["image_size"]


def from_python(row: config.Teacher, grid: int) -> Source:
    """`python:MODULE:FUNCTION`: the module that the user's function makes.

    Its forward maps normalised images [B, 3, size, size] to Tokens. Its attributes image_size,
    patch_size, mean and std count where the row leaves them open; an image_size goes before the
    grid's, since a user's module may take no other.
    """
    block_of(row, 0)  # a python: source returns its own tokens
    model = call_python(row)
    patch = row.patch or side(model, "patch_size")
    size = row.size or side(model, "image_size") or grid * patch
    mean = row.mean or tuple(getattr(model, "mean", ()))
    std = row.std or tuple(getattr(model, "std", ()))
    for key, value in {"size": size, "mean": mean, "std": std}.items():
        if not value:
            raise ValueError(
                f"teacher {row.name!r} ({row.source}) does not say its {key}; "
                f"set teachers.{row.name}.{key}"
            )
    return Source(
        towers.PythonTower(model), size, patch, mean, std, str(getattr(model, "licence", ""))
    )


def side(model: nn.Module, key: str) -> int:
    """An attribute that is a side in pixels, or a pair of them; 0 where there is none."""
    value: Any = getattr(model, key, 0)
    return int(value[0] if isinstance(value, (tuple, list)) else value)


def call_python(row: config.Teacher) -> nn.Module:
    """What the function of a `python:` source returns; ValueError where there is none."""
    where, _, name = row.source.removeprefix("python:").partition(":")
    try:
        make: Callable[[], Any] | None = getattr(importlib.import_module(where), name, None)
    except ImportError as exc:
        raise ValueError(
            f"teacher {row.name!r}: cannot import {where!r} ({exc}); put its folder on PYTHONPATH"
        ) from exc
    if not callable(make):
        raise ValueError(f"teacher {row.name!r}: module {where!r} has no function {name!r}")
    model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"teacher {row.name!r}: {where}:{name} must return a torch module, "
            f"got {type(model).__name__}"
        )
    return model


def first_line(exc: Exception) -> str:
    """The start of an error's text; a strict load can name hundreds of keys."""
    return printable(" ".join(str(exc).split()), 300) or type(exc).__name__


BUILD: dict[str, Callable[[config.Teacher, int], Source]] = {
    "timm": from_timm,
    "file": from_file,
    "open_clip": from_clip,
    "python": from_python,
}
