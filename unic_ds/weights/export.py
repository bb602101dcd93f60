"""Export of a trained encoder as a folder that timm loads, compared with the encoder first.

The folder is in timm's own hub format: `model.safetensors`, `config.json`, and a model card. It
also holds ladder and statistics, so that another run may start from it, and their description
(`ladder.json`), so that the ladder's predictions can be evaluated. The final norm keeps its initial
affine (arXiv 2408.05088: it gets no gradient), so exported features are the residual
stream, normalised.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer, save_for_hf
from torch import Tensor

from unic_ds import config
from unic_ds.files import (
    apply_umask,
    encodable,
    read_text,
    replace_folder,
    tensor_files,
    write_atomic,
)
from unic_ds.models import ladder_description
from unic_ds.models.encoder import architecture, arguments, build_encoder, has_cls, is_narrow
from unic_ds.models.ladder_description import Description
from unic_ds.models.model_folder import CONFIG, LADDER, STATISTICS, WEIGHTS
from unic_ds.tokens import Normalise, Tokens, split_prefix
from unic_ds.weights import card, card_names, narrow_code

TOLERANCE = 1e-5
FILES = {WEIGHTS, CONFIG, card_names.FILE, LADDER, STATISTICS, ladder_description.FILE}
FILES |= {narrow_code.FILE}
LIBRARY, BYTECODE = "timm", "__pycache__"
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
    description: Description | None = None,
    origin: str = "",
    licence: str = "",
    prove: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write the encoder's fp32 `state` to the folder `out`, check that timm loads it; return `out`.

    `images` are uint8 B3HW at `cfg.student.size`; features of both ways of loading must be within
    1e-5 of the encoder's. `teachers` is the run's manifest, for the licences on the model card;
    `origin` is the card's text about the source of the weights, if no run has trained them, and
    `licence` is then theirs.
    `extras` are ladder and statistics, tensors by file name, and `description` is the ladder's.
    `prove` is a further check of the complete folder, before it gets its name.
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
        text = card.render(encoder, cfg, teachers or {}, origin, licence=licence)
        write_atomic(part / card_names.FILE, text)
        for name, tensors in (extras or {}).items():
            tensor_files.save({k: copy_of(v) for k, v in tensors.items()}, part / name)
        if description:
            write_atomic(part / ladder_description.FILE, description.text())
        check_loading(encoder, cfg.student, part, images.cpu())
        prove(part)
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


def refuse_foreign(out: Path, files: Collection[str] = FILES, *, library: str = LIBRARY) -> None:
    """Raise ValueError unless `out`, which will be replaced, is absent, empty or such an export.

    `files` are the names of an export's files, and `library` is that of its card. Bytecode that
    Python has written for an export's module is no foreign file.
    """
    if out.name in ("", ".."):
        raise ValueError(f"{str(out)!r} names no new folder; give the export one, as ./student")
    if not out.exists():
        return
    if not (out.is_dir() and {p.name for p in out.iterdir()} <= {*files, BYTECODE}):
        raise ValueError(f"{str(out)!r} holds something that is no export; choose another folder")
    if library_of(out) not in ("", library):
        raise ValueError(
            f"{str(out)!r} holds an export for {library_of(out)}, which one for {library} does not"
            " replace; choose another folder"
        )


def library_of(folder: Path) -> str:
    """The hub's name of the library that an export's card names, or an empty text."""
    try:
        found = re.search(
            r"^library_name: *([\w.-]+)\s*$", read_text(folder / card_names.FILE), re.M
        )
    except (OSError, ValueError):  # no card, or none of ours
        return ""
    return found[1] if found else ""


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
    if is_narrow(student):
        narrow_code.write(folder)


def check_loading(
    encoder: VisionTransformer, cfg: config.Student, folder: Path, image_B3HW: Tensor
) -> None:
    """Raise RuntimeError unless both ways of loading `folder` give the encoder's tokens."""
    loaders: dict[str, Callable[[], Any]] = {
        "local-dir": lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
        "checkpoint_path": lambda: timm.create_model(
            architecture(cfg),
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
