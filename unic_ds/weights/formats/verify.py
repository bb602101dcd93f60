"""Proof of an export: outputs in a fresh process that cannot import unic_ds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor

from unic_ds.models.encoder import architecture, arguments
from unic_ds.weights.formats.fresh_process import FreshProcess
from unic_ds.weights.formats.handover import Format, Handover, Outputs

TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest value if that exceeds 1."""


def run_fresh(
    form: Format, folder: Path, batches: Sequence[Tensor], *, whole: int | None = None
) -> list[Outputs]:
    """Outputs of uint8 images [B, 3, H, W] by an export that a fresh process loads.

    Those after the first `whole` batches are CLS alone: patches of many images fill memory.
    RuntimeError with the process's last line if it fails.
    """
    count = len(batches) if whole is None else whole
    try:
        with FreshProcess(form, folder, named="the export") as process:
            return [
                process.outputs(batch, names=() if i < count else ("cls",))
                for i, batch in enumerate(batches)
            ]
    except RuntimeError as error:
        raise RuntimeError(f"{error}; nothing was exported") from None


def batches_of(form: Format, handover: Handover) -> list[Tensor]:
    """One image and three at the student's side; if other sides are taken, squares and others."""
    side, patch = handover.cfg.size, handover.patch
    image_B3HW = handover.sample(side)
    batches = [image_B3HW[:1], image_B3HW[:3]]
    if form.sizes(handover):
        larger_B3HW = handover.sample(side + 2 * patch)
        batches += [larger_B3HW[:2], larger_B3HW[-1:, :, :, : side + patch]]
    return batches


def prove(form: Format, handover: Handover, folder: Path) -> None:
    """Raise RuntimeError unless a fresh process gives the student's outputs, to `TOLERANCE`."""
    batches = batches_of(form, handover)
    expected = [(form.reference or reference)(handover, batch) for batch in batches]
    for ours, theirs in zip(expected, run_fresh(form, folder, batches), strict=True):
        if ours.keys() != theirs.keys():
            raise RuntimeError(
                f"the export gives {', '.join(sorted(theirs))} in place of"
                f" {', '.join(sorted(ours))}; nothing was exported"
            )
        for name, x in ours.items():
            if (gap := difference(x, theirs[name])) is None or not gap <= TOLERANCE:
                raise RuntimeError(
                    f"in a fresh process the export's {name} differs by {gap or 'its shape'} from"
                    f" the student's, allowed is {TOLERANCE:.0e}; nothing was exported"
                )


@torch.no_grad()
def reference(handover: Handover, image_B3HW: Tensor) -> Outputs:
    """The student's outputs, at another size with timm's own resampling of positions."""
    cfg = handover.cfg
    if image_B3HW.shape[2:] == (cfg.size, cfg.size):
        return handover.outputs(image_B3HW)
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(architecture(cfg), dynamic_img_size=True, **arguments(cfg))
    encoder = cast(VisionTransformer, model)
    encoder.load_state_dict(handover.encoder.state_dict())
    return replace(handover, encoder=encoder.eval()).outputs(image_B3HW)


def cls_alone(outputs: Outputs) -> Outputs:
    """A copy of CLS, without the other tokens that it may be a view of."""
    return {"cls": outputs["cls"].clone()}


def difference(ours: Tensor, theirs: Tensor) -> float | None:
    """Largest difference, relative to values above 1; None for different shapes."""
    if ours.shape != theirs.shape:
        return None
    return ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).item()


def joined(outputs: Sequence[Outputs], name: str) -> Tensor:
    """One output of all batches."""
    return torch.cat([found[name] for found in outputs])
