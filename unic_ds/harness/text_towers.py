"""Text towers of CLIP and SigLIP teachers, with the projections that their image features pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import open_clip
import torch
from open_clip.modified_resnet import AttentionPool2d
from open_clip.timm_model import TimmModel
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds.config import Teacher
from unic_ds.files.printable import printable
from unic_ds.harness import heads
from unic_ds.process import console
from unic_ds.teachers.adapters import ClipViT, TimmMap, TimmViT, Tower
from unic_ds.teachers.probe import first_line
from unic_ds.teachers.sources import open_clip as source
from unic_ds.teachers.sources import timm
from unic_ds.tokens import Tokens

if TYPE_CHECKING:
    from open_clip import CLIP

WITH_TEXT = ("clip", "siglip", "pe_core", "vitamin", "mci")
"""Parts of the names of timm's image towers that were trained with text."""

TEXTS = 256
"""Texts of one forward."""

Projection = Callable[[Tensor], Tensor]
"""Summary tokens (B, C) -> embeddings (B, E)."""


@dataclass(frozen=True)
class ClipText:
    """The text tower of an open_clip model (`features.TextTower`)."""

    model: CLIP
    """Without its image tower."""
    tokenize: Callable[[Sequence[str]], Tensor]
    projection: Projection
    device: torch.device
    arch: str = ""
    """open_clip's name of the architecture."""

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (M, E) of texts, fp32 on the device."""
        parts = [
            self.model.encode_text(
                self.tokenize(list(texts[at : at + TEXTS])).to(self.device), normalize=True
            )
            for at in range(0, len(texts), TEXTS)
        ]
        return torch.cat(parts).float()

    @torch.no_grad()
    def project(self, cls_BC: Tensor) -> Tensor:
        """Embeddings (B, E) of the teacher's summary tokens, not normalised."""
        return self.projection(cls_BC.float())


def was_with_text(source: str) -> bool:
    """True if a teacher's source is by its kind and name a tower that was trained with text."""
    kind, _, name = source.partition(":")
    return kind == "open_clip" or (kind == "timm" and any(part in name for part in WITH_TEXT))


def read_all(rows: Sequence[Teacher], *, grid: int, device: torch.device) -> dict[str, ClipText]:
    """Text towers of the teachers that have one; of each other one, a line says why."""
    found = {}
    for row in rows:
        try:
            found[row.name] = read(row, grid=grid, device=device)
        except ValueError as error:
            console.say(f"no text tower: {error}")
    return found


def read(row: Teacher, *, grid: int, device: torch.device) -> ClipText:
    """The text tower of an open_clip: row, or of a timm: row whose weights open_clip has too.

    ValueError if the row is of another kind, is read after an inner block, or if its weights are
    not on this machine; also if the image embedding cannot be computed from its summary token.
    """
    if row.block != "output":
        raise ValueError(
            f"teacher {row.name!r} has no text space: its tokens are those after block {row.block},"
            " and text is compared with those of --teachers.NAME.block output"
        )
    if row.parsed_source.kind == "timm":
        return read_twin(row, grid, device)
    if row.parsed_source.kind != "open_clip":
        raise ValueError(
            f"teacher {row.name!r} has no text tower: {printable(row.source)} is no open_clip: row"
        )
    return with_summary(row, device)[0]


@torch.no_grad()
def with_summary(row: Teacher, device: torch.device) -> tuple[ClipText, int, Tensor]:
    """(text tower of an open_clip: row, side of its images, its summaries (2, C) of noise)."""
    tokenize = tokenizer(row)
    size = side_of(row)
    model = source.whole(row, size).to(device).eval().requires_grad_(False)
    image_B3HW = heads.noise(size, device)
    whole_BE = model.encode_image(image_B3HW, normalize=True)
    last = getattr(model.visual, "proj", None), getattr(model.visual, "attnpool", None)
    tower = source.visual_tower(row, size, model).tower
    projection = projection_of(tower, model.visual, *last)
    cls_BC = tower(image_B3HW).cls_BC
    heads.drop_blocks(tower)
    try:
        same = heads.agrees(F.normalize(projection(cls_BC)), whole_BE)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a head of a library that is given what it does not expect
        same = False
    if not same:
        raise ValueError(
            f"teacher {row.name!r} has no text tower: {row.parsed_source.model} compares with text"
            " what cannot be computed from its summary token"
        )
    model.visual = nn.Identity()  # the rest of the image tower; `projection` has what it needs
    text = ClipText(model, tokenize, projection, device, row.parsed_source.model)
    return text, size, cls_BC


def projection_of(
    tower: Tower, visual: nn.Module, matrix_CE: Tensor | None, pool: nn.Module | None
) -> Projection:
    """The map from a tower's summary to the image embedding.

    `matrix_CE` and `pool` are those of open_clip's own ViT and ResNet, which the tower lacks.
    """
    if isinstance(tower, ClipViT):
        assert matrix_CE is not None
        # A pool narrower than the patches: its summary is padded with zeros.
        return lambda cls_BC: cls_BC[:, : len(matrix_CE)] @ matrix_CE
    if isinstance(pool, AttentionPool2d):
        return pool.c_proj
    assert isinstance(tower, (TimmViT, TimmMap)) and isinstance(visual, TimmModel)
    trunk = heads.TimmHead(tower).eval()
    return lambda cls_BC: visual.head(trunk(Tokens(cls_BC, cls_BC.new_empty(0))))


def side_of(row: Teacher) -> int:
    """Side of the images that an architecture of open_clip was made for, in pixels."""
    side = open_clip.get_model_config(row.parsed_source.model)["vision_cfg"].get("image_size", 224)
    return side if isinstance(side, int) else int(side[0])


def tokenizer(row: Teacher) -> Callable[[Sequence[str]], Tensor]:
    """open_clip's tokenizer of an architecture, with its own cleaning of text.

    That of SigLIP lowers case and removes punctuation. ValueError if it is not on this machine.
    """
    arch = row.parsed_source.model
    source.published(row)
    name = open_clip.get_model_config(arch)["text_cfg"].get("hf_tokenizer_name", "")
    try:
        return open_clip.get_tokenizer(arch, **({"local_files_only": True} if name else {}))
    except ImportError as error:
        raise ValueError(
            f"teacher {row.name!r} has no text tower: the tokenizer of {arch} needs the package"
            " transformers; pip install transformers"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher {row.name!r} has no text tower: its tokenizer {name} is not in the hub's"
            f" cache ({first_line(error)}); run `hf download {name}` on a machine with network"
        ) from error


def read_twin(row: Teacher, grid: int, device: torch.device) -> ClipText:
    """The text tower of a timm: row, from weights of open_clip whose summaries are the row's.

    Names do not tell: SigLIP and SigLIP 2 have one architecture. ValueError, with the remedy, if
    open_clip has none, or they are not on this machine.
    """
    twins = list(twins_of(row))
    there = [twin for twin in twins if is_cached(twin)]
    for twin in there:
        text, size, theirs_BC = with_summary(twin, device)
        tower = timm.read(replace(row, size=size), grid).tower.to(device).eval()
        with torch.no_grad():
            if heads.agrees(tower(heads.noise(size, device)).cls_BC, theirs_BC):
                return text
    missing = [f"`unic-ds teachers fetch --teachers {t.name}={t.source}`" for t in twins]
    remedy = f"run {' or '.join(missing)}" if len(there) < len(twins) else "give an open_clip: row"
    raise ValueError(
        f"teacher {row.name!r} has no text tower: no open_clip model on this machine has the"
        f" weights of {row.source}; {remedy}"
    )


def is_cached(row: Teacher) -> bool:
    """True if a row's weights are on this machine."""
    try:
        return source.locate(row).is_file()
    except ValueError:
        return False


def twins_of(row: Teacher) -> Iterator[Teacher]:
    """open_clip: rows of the same published weights as a timm: row, or of its architecture."""
    if not was_with_text(row.source):
        return
    name = row.parsed_source.model
    cfg = get_pretrained_cfg(name)
    repo = f"{cfg.hf_hub_id}/" if cfg and cfg.hf_hub_id else "?"
    for arch, tag in open_clip.list_pretrained():
        vision = (open_clip.get_model_config(arch) or {}).get("vision_cfg", {})
        same = vision.get("timm_model_name") == row.parsed_source.arch
        if same or open_clip.get_pretrained_cfg(arch, tag).get("hf_hub") == repo:
            yield replace(row, source=f"open_clip:{arch}/{tag}", patch=0, size=0)
