"""Export of a trained encoder as a folder that timm loads, compared with the encoder first.

The folder is in timm's own hub format: `model.safetensors`, `config.json`, and a model card. It
also holds ladder and statistics, so that another run may start from it. The final norm keeps its
initial affine (arXiv 2408.05088: it gets no gradient), so exported features are the residual
stream, normalised.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer, save_for_hf
from torch import Tensor

from unic_ds import config
from unic_ds.files import apply_umask, encodable, replace_folder, tensor_files, write_atomic
from unic_ds.files.printable import markdown
from unic_ds.models.encoder import arguments, build_encoder, has_cls
from unic_ds.tokens import Normalise, Tokens, split_prefix
from unic_ds.weights.warm_start import LADDER, STATISTICS, WEIGHTS

TOLERANCE = 1e-5
FILES = {WEIGHTS, "config.json", "README.md", LADDER, STATISTICS}
PLAIN = re.compile(r"[A-Za-z0-9_ .,:;/()#=@+-]{,400}")
"""Text that Markdown and HTML show unchanged, unless it begins a line."""
FOREIGN = ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes", "description")
"""Keys of timm's registry that describe its own weights, not these."""


def export(
    state: dict[str, Tensor],
    cfg: config.Config,
    images: Tensor,
    out: Path,
    *,
    teachers: Mapping[str, Mapping[str, Any]] | None = None,
    extras: Mapping[str, Mapping[str, Tensor]] | None = None,
    origin: str = "",
) -> Path:
    """Write the encoder's fp32 `state` to the folder `out`, check that timm loads it; return `out`.

    `images` are uint8 B3HW at `cfg.student.size`; features of both ways of loading must be within
    1e-5 of the encoder's. `teachers` is the run's manifest, for the licences on the model card;
    `origin` is the card's text about the source of the weights, if no run has trained them.
    `extras` are ladder and statistics, tensors by file name.
    RuntimeError if features differ: nothing is left at `out`, but an earlier export stays.
    ValueError if `out` holds something that is no export, or weights or images do not fit;
    OSError if it cannot be written.
    """
    refuse_foreign(out)
    size = cfg.student.size
    if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
        raise ValueError(
            f"the export is checked on uint8 images of 3 x {size} x {size},"
            f" got {images.dtype} {tuple(images.shape)}"
        )
    part = out.with_name(f".{out.name}.partial")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    try:
        part.mkdir(parents=True)
        encoder = load(state, cfg.student)
        write(encoder, cfg, part)
        text = card(encoder, cfg, teachers or {}, origin)
        write_atomic(part / "README.md", text)
        for name, tensors in (extras or {}).items():
            tensor_files.save({k: copy_of(v) for k, v in tensors.items()}, part / name)
        check_loading(encoder, cfg.student, part, images.cpu())
        refuse_foreign(out)  # another process may have written it since
        replace_folder(part, out)
        return out
    except OSError as error:
        raise OSError(f"{str(out)!r} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_of(x: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares its memory with no tensor, as safetensors needs."""
    return x.cpu().clone(memory_format=torch.contiguous_format)


def refuse_foreign(out: Path) -> None:
    """Raise ValueError unless `out`, which will be replaced, is absent, empty or an export."""
    if out.name in ("", ".."):
        raise ValueError(f"{str(out)!r} names no new folder; give the export one, as ./student")
    if out.exists() and not (out.is_dir() and {p.name for p in out.iterdir()} <= FILES):
        raise ValueError(f"{str(out)!r} holds something that is no export; choose another folder")


def load(state: dict[str, Tensor], cfg: config.Student) -> VisionTransformer:
    """Build the encoder in eval mode with these weights; ValueError unless all are in fp32."""
    encoder: VisionTransformer = build_encoder(cfg)
    want = encoder.state_dict()
    missing, foreign = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    if missing or foreign:
        raise ValueError(
            f"the weights are not those of {cfg.model}: missing {missing[:3]},"
            f" unknown {foreign[:3]}"
        )
    narrow = sorted(name for name, value in state.items() if value.dtype != torch.float32)
    if narrow:
        raise ValueError(
            f"an export takes fp32 weights, but {narrow[0]} is {state[narrow[0]].dtype}"
        )
    encoder.load_state_dict(state)
    return encoder.eval()


def write(encoder: VisionTransformer, cfg: config.Config, folder: Path) -> None:
    """Fill `folder` with weights and timm's config."""
    student = cfg.student
    for key in FOREIGN:
        vars(encoder)["pretrained_cfg"].pop(key, None)
    preprocessing = {
        "input_size": (3, student.size, student.size),
        "mean": student.mean,
        "std": student.std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    save_for_hf(encoder, str(folder), safe_serialization=True, data_config=preprocessing)
    apply_umask(folder / WEIGHTS)


def check_loading(
    encoder: VisionTransformer, cfg: config.Student, folder: Path, image_B3HW: Tensor
) -> None:
    """Raise RuntimeError unless both ways of loading `folder` give the encoder's tokens."""
    loaders: dict[str, Callable[[], Any]] = {
        "local-dir": lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
        "checkpoint_path": lambda: timm.create_model(
            cfg.model,
            checkpoint_path=str(folder / "model.safetensors"),
            **arguments(cfg),
        ),
    }
    folder = encodable(folder)
    expected = tokens(encoder, cfg, image_B3HW)
    for way, create in loaders.items():
        loaded = tokens(create().eval(), cfg, image_B3HW)
        gaps = [(a - b).abs().max().item() for a, b in zip(expected, loaded, strict=True)]
        if not all(gap <= TOLERANCE for gap in gaps):  # written so that NaN fails, too
            raise RuntimeError(
                f"loaded by {way}, the export does not give the encoder's features: they differ by"
                f" {gaps[0]:.1e} (cls) and {gaps[1]:.1e} (patches), allowed is {TOLERANCE:.0e};"
                " nothing was exported"
            )


@torch.inference_mode()
def tokens(encoder: VisionTransformer, cfg: config.Student, image_B3HW: Tensor) -> Tokens:
    """Tokens in fp32 after the encoder's final norm."""
    x_BND = encoder.forward_features(Normalise(cfg.mean, cfg.std)(image_B3HW, torch.float32))
    return split_prefix(x_BND, encoder.num_prefix_tokens, has_cls=has_cls(encoder))


def card(
    encoder: VisionTransformer, cfg: config.Config, teachers: Mapping[str, Any], origin: str
) -> str:
    """Model card in Markdown, with a row for each teacher of the manifest or the settings."""
    student = cfg.student
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    named = {row.name: row.parsed_source.without_folders for row in cfg.teachers}
    sources = dict.fromkeys(teachers, "unknown") | named
    licences = {name: row.get("licence") for name, row in teachers.items()}
    rows = "\n".join(
        f"| {cell(name)} | {code(where)} | {cell(str(licences.get(name) or 'unknown'))} |"
        for name, where in sources.items()
    )
    return CARD.format(
        origin=cell(origin or f"distilled by unic_ds ({cfg.recipe or 'a custom run'})"),
        model=student.model,
        millions=millions,
        width=encoder.num_features,
        size=student.size,
        arguments=", ".join(f"{key}={value}" for key, value in arguments(student).items()),
        grid=encoder.patch_embed.grid_size[0],
        mean=", ".join(map(str, student.mean)),
        std=", ".join(map(str, student.std)),
        norm=f"\n{INITIAL_NORM}\n" if has_initial_norm(encoder) else "",
        rows=rows or "| - | - | - |",
    )


def has_initial_norm(encoder: VisionTransformer) -> bool:
    """True if the final norm has its initial affine, scale 1 and offset 0."""
    return all(
        bool((value == float(name == "weight")).all())
        for name, value in encoder.norm.named_parameters()
    )


def cell(text: str) -> str:
    """Text from outside for Markdown, escaped if it has characters that could be markup."""
    return text if PLAIN.fullmatch(text) else markdown(text)


def code(text: str) -> str:
    """Text from outside as code in Markdown; escaped text if it could end the code."""
    return f"`{text}`" if PLAIN.fullmatch(text) else markdown(text)


INITIAL_NORM = "The final norm has its initial affine (scale 1, offset 0): it was not trained."
CARD = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
license: other
tags:
- timm
- image-feature-extraction
- distillation
---
# {model}, {origin}

One ViT that learned the features of several frozen teachers by the UNIC method (arXiv 2408.05088).

| | |
|---|---|
| architecture | timm `{model}`, {millions:.1f} M parameters, no head |
| images | RGB, {size} x {size} px, bicubic, whole image (crop_pct 1.0) |
| mean | {mean} |
| std | {std} |
| features | {width} wide: CLS and a {grid} x {grid} grid of patch tokens, after the final norm |
{norm}
## Loading
```python
import timm

model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
# the same by name:
model = timm.create_model(
    "{model}", checkpoint_path="THIS_FOLDER/model.safetensors", {arguments}
).eval()

transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
tokens = model.forward_features(images)  # prefix tokens (CLS first), then patches
```
Both ways were run when this folder was written, and gave the encoder's features to 1e-5 in fp32.

## Teachers
Their licences bear on what may be done with these weights.

| teacher | source | licence |
|---|---|---|
{rows}
"""
