"""Pruning of a run's student by images of the run, for `unic-ds export --prune`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import torch
from timm.models import VisionTransformer

from unic_ds import config, data
from unic_ds.training.setup import sample_images
from unic_ds.weights import pruning
from unic_ds.weights.export import tokens

MOST = 0.9
"""Largest share of heads and channels that may go."""
IMAGES, BATCH = 256, 16
"""Images that importance is measured on, and those of a batch."""


def prune(
    encoder: VisionTransformer,
    student: config.Student,
    share: float,
    cfg: config.Config | None,
    *,
    named: str,
) -> tuple[VisionTransformer, config.Student]:
    """The encoder without a share of its heads and MLP channels, and its settings.

    `cfg` is that of its run. Prints how far the features are from those before. ValueError for a
    student without a run, whose images tell which heads and channels matter.
    """
    if cfg is None:
        raise ValueError(
            f"--prune needs training images, but {named} is in no run folder; give the run, its"
            " student/, or move the folder to RUN/encoders/"
        )
    attn, mlp, *_ = pruning.parts_of(encoder, share)
    source = data.scan(cfg.data.train)
    image_B3HW = sample_images(cfg, source, IMAGES)(student.size)
    print(f"measuring the importance of heads and channels on {len(image_B3HW)} training images")
    found, narrow = pruning.prune(encoder, student, share, image_B3HW.split(BATCH))
    shown_B3HW = sample_images(cfg, source)(student.size)
    both = (tokens(x, student, shown_B3HW) for x in (encoder, found))
    cosines = [torch.cosine_similarity(x, y, dim=-1).mean() for x, y in zip(*both, strict=True)]
    before, after = (sum(p.numel() for p in x.parameters()) / 1e6 for x in (encoder, found))
    print(
        f"pruned to {narrow.heads} of {attn.groups} heads and {narrow.mlp_width} of"
        f" {mlp.groups} MLP channels in each block, {after:.1f} of {before:.1f} M"
        f" parameters; mean cosine to the student's features: cls {cosines[0]:.4f}, patch"
        f" {cosines[1]:.4f}"
    )
    return found, narrow


def further(student: config.Student, out: Path, *, changed: bool) -> str:
    """Advice on a run that distils the pruned student in `out`; `changed`: at another size."""
    options = {"init": quote(str(out)), "heads": student.heads, "mlp_width": student.mlp_width}
    options |= {"size": student.size} if changed else {}
    words = " ".join(f"--student.{name} {value}" for name, value in options.items())
    return f"To distil it further, give the run's own command a new --out and {words}"
