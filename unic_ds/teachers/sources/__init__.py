"""Reads a teacher of each kind of source: its tower, with weights, and how it wants its images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from unic_ds import config
from unic_ds.config.models import check_scale
from unic_ds.config.overrides import nearest
from unic_ds.files import encodable
from unic_ds.files.printable import printable
from unic_ds.files.tensor_files import Safetensors
from unic_ds.teachers import adapters, probe, weight_files
from unic_ds.teachers.adapters import Source
from unic_ds.teachers.probe import first_line
from unic_ds.teachers.sources.python import from_python
from unic_ds.teachers.sources.shapes import build, check_patch, stride_of, timm_outline, vit_size

MOST_CLASSES = 1_000_000
"""Outputs of the largest classifier in a weight file: it is built before the weights are read."""


def read(row: config.Teacher, grid: int) -> Source:
    """A row of a recipe, with weights, on the CPU; the student's patch grid is `grid` x `grid`.

    ValueError for what a user can cause: an unknown name, missing or foreign weights, a size that
    does not fit.
    """
    fuse_attention()
    source = BUILD[row.source.partition(":")[0]](row, grid)
    weight_files.refuse_not_finite(row, source.tower)
    return source


def fuse_attention() -> None:
    """Have timm use scaled_dot_product_attention also where it asks to be told: Swin's windows."""
    timm.layers.set_fused_attn(enable=True, experimental=True)


def outline(row: config.Teacher, *, grid: int) -> Source:
    """A teacher without its weights, on meta, that gave tokens of two images. ValueError as `read`.

    A python: source is called as it is, weights and all.
    """
    python = row.source.startswith("python:")
    with torch.random.fork_rng(devices=[], enabled=python):  # a run draws as if this had not been
        source = skeleton(row, grid)
    preprocessing(row, source)
    source.tower.to(probe.DTYPE[row.precision]).requires_grad_(False).eval()

    def see(image_B3HW: torch.Tensor) -> Any:
        return source.tower(image_B3HW.to(probe.DTYPE[row.precision]))

    device = torch.device("cpu" if python else "meta")
    probe.measure(row, source.size, see, device=device)
    return source


def skeleton(row: config.Teacher, grid: int) -> Source:
    """A teacher without its weights, on meta, that nobody has run yet. ValueError as `read`."""
    fuse_attention()
    kind, _, rest = row.source.partition(":")
    if kind == "python":
        return BUILD[kind](row, grid)
    if kind != "file":
        weight_files.place(row)
    with torch.device("meta"):
        if kind == "open_clip":
            return clip_outline(row, grid, rest.partition("/")[0])
        arch = rest.rpartition("#arch=")[2]
        check_arch(row, arch)
        size, _, model = timm_outline(row, grid, arch)
        behead(model)
        wants = timm.data.resolve_model_data_config(model)
        tower, patch = timm_tower(row, model)
    return Source(tower, size, patch, wants["mean"], wants["std"])


def kind_of(row: config.Teacher, grid: int) -> dict[str, Any]:
    """Facts of a teacher's tokens that its architecture decides: the side it is fed, its summary.

    Empty if it cannot be built here.
    """
    if row.source.startswith("python:"):
        return {}
    try:
        source = skeleton(row, grid)
    except ValueError:
        return {}
    return {"size": source.size, "cls": source.tower.summary}


def preprocessing(
    row: config.Teacher, source: Source
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of a teacher's images: the row's, or its source's own.

    ValueError for those of a scale of 0 to 255.
    """
    mean, std = tuple(row.mean or source.mean), tuple(row.std or source.std)
    check_scale(mean, std, f"teachers.{row.name}")
    return mean, std


def check_arch(row: config.Teacher, arch: str) -> None:
    """ValueError unless timm has an architecture."""
    if not timm.is_model(arch.split(".")[0]):
        near = nearest(arch, timm.list_models())
        raise ValueError(f"teachers.{row.name}.source: timm has no arch {arch!r}{near}")


def clip_outline(row: config.Teacher, grid: int, arch: str) -> Source:
    """An open_clip tower without its weights."""
    import open_clip

    size = clip_size(row, grid, open_clip.get_model_config(arch)["vision_cfg"])
    options = {"force_image_size": size, "device": "meta"}
    return clip_source(row, size, build(row, open_clip.create_model, arch, **options))


def from_timm(row: config.Teacher, grid: int) -> Source:
    """`timm:NAME`: published weights from the hub's cache, loaded strictly, then beheaded."""
    weight_files.check(row)
    return timm_source(row, grid, row.source.removeprefix("timm:"), {})


def from_file(row: config.Teacher, grid: int) -> Source:
    """`file:PATH#arch=NAME`: local safetensors or weights-only .pth, through timm's own filters."""
    path = weight_files.locate(row)
    assert path is not None
    source = file_source(row, grid, path, {"file": str(encodable(path))})
    return source._replace(licence=licence_of(path))


def file_source(row: config.Teacher, grid: int, path: Path, overlay: dict[str, Any]) -> Source:
    """A timm model with weights that `overlay` names to timm: those of the file at `path`."""
    arch = row.source.rpartition("#arch=")[2]
    check_arch(row, arch)
    classes = classes_of(row, path, arch)
    # The head is built as the file has it: timm is strict only where their classes agree.
    overlay |= {"num_classes": classes, "label_offset": 0, "custom_load": False}
    return timm_source(row, grid, arch, overlay, num_classes=classes)


def check_fit(row: config.Teacher, grid: int) -> None:
    """ValueError unless the weights of a file: teacher have its architecture's names and shapes.

    They are mapped and not read. A filter of timm that looks at values is not run to its end: such
    weights are checked when they are loaded.
    """
    path = weight_files.locate(row)
    assert path is not None
    try:
        state = {k: x.to("meta") for k, x in weight_files.state_of(path).items()}
    except (ValueError, AttributeError):  # what is wrong with the file, `classes_of` says
        state = {}
    try:
        with torch.device("meta"):
            file_source(row, grid, path, {"state_dict": state})
    except ValueError as error:
        cause = error.__cause__
        if not isinstance(cause, NotImplementedError) and "meta tensor" not in str(cause):
            raise


def classes_of(row: config.Teacher, path: Path, arch: str) -> int:
    """Classes of the classifier in a weight file (0: none); ValueError where it has no weights."""
    cfg = timm.get_pretrained_cfg(arch)
    names = (cfg and cfg.classifier) or ()
    try:
        state = weight_files.state_of(path)
        wrong = (
            weight_files.foreign(state)
            or weight_files.integers(state, arch)
            or weight_files.patches(state)
        )
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
    with torch.device("meta"):  # what fails after this is the weights' fault
        size, shape, _ = timm_outline(row, grid, name)
    model: Any
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
    behead(model)
    wants = timm.data.resolve_model_data_config(model)
    tower, patch = timm_tower(row, model)
    licence = model.pretrained_cfg.get("license") or ""
    return Source(tower, size, patch, wants["mean"], wants["std"], licence)


def behead(model: Any) -> None:
    """Remove a timm model's classifier; vision encoders of language models have none."""
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0)


def timm_tower(row: config.Teacher, model: Any) -> tuple[nn.Module, int]:
    """(tower, pixels a patch token covers) of a timm model; 0 pixels where it gives a map."""
    stride = stride_of(model)
    if stride:
        return adapters.TimmViT(model, block_of(row, len(model.blocks))), stride
    return adapters.TimmMap(model, block_of(row, len(getattr(model, "feature_info", ())))), 0


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

    weight_files.check(row)
    arch, _, tag = row.source.removeprefix("open_clip:").partition("/")
    with torch.device("meta"):
        outline = clip_outline(row, grid, arch)  # what fails below is then the weights' fault
    try:
        model = open_clip.create_model(arch, pretrained=tag, force_image_size=outline.size)
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:
        raise ValueError(
            f"teacher {row.name!r}: its weights do not fit {arch} ({first_line(exc)})"
        ) from exc
    return clip_source(row, outline.size, model)


def clip_source(row: config.Teacher, size: int, model: Any) -> Source:
    """The visual tower of an open_clip model: its own ViT or ResNet, or a timm trunk."""
    import open_clip

    visual: Any = model.visual
    wants = open_clip.get_model_preprocess_cfg(model)
    tower: nn.Module
    patch: int
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        block = block_of(row, len(visual.transformer.resblocks))
        tower, patch = adapters.ClipViT(visual, block), visual.patch_size[0]
    elif isinstance(visual, open_clip.timm_model.TimmModel):
        tower, patch = timm_tower(row, visual.trunk)
    else:
        block_of(row, 0)
        tower, patch = adapters.ClipMap(visual), 0
    return Source(tower, size, patch, tuple(wants["mean"]), tuple(wants["std"]))


def clip_size(row: config.Teacher, grid: int, vision: dict[str, Any]) -> int:
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
    return vit_size(row, grid, patch) if patch else row.size or vision["image_size"]


def own_tokens(row: config.Teacher, grid: int) -> Source:
    """A python: source, which returns its own tokens: there is no block to choose."""
    block_of(row, 0)
    return from_python(row, grid)


BUILD: dict[str, Callable[[config.Teacher, int], Source]] = {
    "timm": from_timm,
    "file": from_file,
    "open_clip": from_clip,
    "python": own_tokens,
}
