"""How a timm or open_clip teacher is built: the side it is fed and the options that follow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch

from unic_ds import config
from unic_ds.teachers.probe import first_line


def build(row: config.Teacher, create: Callable[..., Any], arch: str, **options: Any) -> Any:
    """A model of timm or open_clip; ValueError if the library refuses its name or its options."""
    try:
        with quiet():
            return create(arch, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # either library raises anything from KeyError to AssertionError
        given = "".join(f", {key} {value}" for key, value in options.items() if key != "device")
        library = create.__module__.partition(".")[0]
        raise ValueError(
            f"teacher {row.name!r}: {library} cannot build {arch}{given} ({first_line(exc)})"
        ) from exc


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what open_clip warns of a model without weights, which is what is wanted."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def timm_outline(row: config.Teacher, grid: int, name: str) -> tuple[int, dict[str, Any], Any]:
    """(image side, constructor options that make the model take it, the model so made).

    ValueError if there is no such model, or its weights cannot be had for that side.
    """
    own = build(row, timm.create_model, name)
    size, shape = timm_shape(row, grid, own)
    model = build(row, timm.create_model, name, **shape)
    state, wants = own.state_dict(), model.state_dict()
    same = all(key in state and state[key].shape == x.shape for key, x in wants.items())
    if same or hasattr(model, "set_input_size"):
        return size, shape, model
    overlay = {"state_dict": state, "custom_load": False}
    try:  # timm's own loader knows which weights it can resample
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **shape)
    except Exception as exc:
        own_size = own.pretrained_cfg["input_size"][-1]
        raise ValueError(
            f"teachers.{row.name}.size must be {own_size}, got {size}: timm cannot resample the"
            f" positions of {name} (its map is then resized to the student's grid)"
        ) from exc
    return size, shape, model


def stride_of(model: Any) -> int:
    """Pixels that a patch token of a timm ViT covers; 0 if the model is none.

    A ViT keeps one sequence of patch tokens behind `num_prefix_tokens` others. Its stride is that
    of its patches times that of the convolutions before them (hybrids, ViTamin, MobileCLIP).
    """
    embed: Any = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    patch = getattr(embed, "patch_size", None)
    if not (isinstance(patch, tuple) and hasattr(model, "num_prefix_tokens")):
        return 0
    if not hasattr(model, "blocks"):
        return 0
    return int(embed.feat_ratio() if hasattr(embed, "feat_ratio") else patch[0])


def timm_shape(row: config.Teacher, grid: int, outline: Any) -> tuple[int, dict[str, Any]]:
    """(image side, constructor options that make the model take it)."""
    stride = stride_of(outline)
    if not stride:
        check_patch(row, 0, type(outline).__name__)
        size = row.size or outline.pretrained_cfg["input_size"][-1]
        return size, {"img_size": size} if outline.pretrained_cfg.get("fixed_input_size") else {}
    if hasattr(outline, "embeds"):  # NaFlexViT, which takes any side
        check_patch(row, stride, type(outline).__name__)
        return vit_size(row, grid, stride), {}
    if not isinstance(outline.patch_embed, timm.layers.PatchEmbed):
        check_patch(row, stride, type(outline).__name__)
    patch = row.patch or stride
    size = vit_size(row, grid, patch)
    return size, {"img_size": size} | ({"patch_size": patch} if patch != stride else {})


def check_patch(row: config.Teacher, own: int, kind: str) -> None:
    """ValueError if a row asks for other patches of a model that has only its own (0: none)."""
    if row.patch not in (0, own):
        want = f"0 or its own {own}" if own else "0"
        why = "cannot change them" if own else "is no ViT"
        raise ValueError(f"teachers.{row.name}.patch must be {want}, got {row.patch}: {kind} {why}")


def vit_size(row: config.Teacher, grid: int, patch: int) -> int:
    """The image side of a ViT: the row's, or what makes the grids agree (method: section 1)."""
    size = row.size or grid * patch
    if size % patch:
        raise ValueError(
            f"teachers.{row.name}.size must be a multiple of its patch {patch}, got {size}"
        )
    return size
