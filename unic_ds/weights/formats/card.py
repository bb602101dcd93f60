"""Card of an export in another format than timm's."""

from __future__ import annotations

from collections.abc import Sequence

from unic_ds import config
from unic_ds.models.encoder import has_cls
from unic_ds.weights import card_facts
from unic_ds.weights.card import (
    DISTILLED,
    INITIAL_NORM,
    argument_text,
    block_text,
    cell,
    has_initial_norm,
    teacher_table,
    warning_lines,
)
from unic_ds.weights.formats import verify
from unic_ds.weights.formats.handover import Format, Handover, Precision


def render(
    form: Format, handover: Handover, notes: Sequence[str], *, quantise: Precision = ""
) -> str:
    """Markdown with the code that loads the folder, and a row for each teacher."""
    student, encoder = handover.cfg, handover.encoder
    rows = card_facts.teacher_rows(config.Config(student=student), handover.teachers)
    data = card_facts.metadata(rows, library=form.library, licence=handover.licence)
    data.pipeline_tag = form.task
    side = f"{student.size} x {student.size} px"
    anywhere = f", or any sides that are multiples of {handover.patch} px"
    return CARD.format(
        metadata=data.to_yaml(),
        warning="\n>\n".join(warning_lines(rows, licence=handover.licence)),
        origin=cell(handover.origin or DISTILLED),
        title=form.title,
        model=student.model,
        blocks=block_text(student),
        arguments=argument_text(student),
        millions=sum(p.numel() for p in encoder.parameters()) / 1e6,
        images=side + (anywhere if form.sizes(handover) else ""),
        mean=", ".join(map(str, student.mean)),
        std=", ".join(map(str, student.std)),
        outputs=outputs_of(form, handover),
        norm=f"\n{INITIAL_NORM}\n" if has_initial_norm(encoder) else "",
        snippet=form.snippet,
        proof=proof_of(form, handover, notes, quantise),
        teachers=teacher_table(rows),
    )


def outputs_of(form: Format, handover: Handover) -> str:
    """Rows of the outputs that were proven, with their widths."""
    texts = OUTPUTS if has_cls(handover.encoder) else OUTPUTS | {"cls": MEAN}
    reference = form.reference or verify.reference
    found = reference(handover, handover.sample(handover.cfg.size)[:1])
    return "\n".join(
        f"| `{name}` | {texts.get(name) or prediction_named(name)}, {value.shape[-1]} wide |"
        for name, value in found.items()
    )


def prediction_named(name: str) -> str:
    """Text on a kept teacher's output `TEACHER_KIND`."""
    teacher, _, kind = name.rpartition("_")
    return f"prediction of {teacher}'s {'CLS token' if kind == 'cls' else 'patch tokens'}"


def proof_of(form: Format, handover: Handover, notes: Sequence[str], quantise: Precision) -> str:
    """Sentences on the comparison that was made before the folder got its name."""
    kind = "images of its training run" if handover.real_images else "noise (no run's images)"
    sizes = ", in two sizes" if form.sizes(handover) else ""
    ran = f"A process without unic_ds ran this code on {kind}, one and three at a time{sizes}"
    if not notes:
        return f"{ran}: outputs are the student's to 1e-4."
    return "\n".join([f"{ran}. Weights are {quantise}:", "", *(f"- {note}" for note in notes)])


OUTPUTS = {
    "cls": "CLS token after the final norm",
    "patch": "patch tokens after the final norm, in rows from the top left",
    "image": "embeddings of images, of unit length",
    "text": "embeddings of texts, of unit length",
}
MEAN = "mean of the patch tokens (there is no CLS token) after the final norm"
CARD = """\
---
{metadata}
---
# {model} for {title}, {origin}

One ViT that learned the features of several frozen teachers by the UNIC method (arXiv 2408.05088).

| | |
|---|---|
| architecture | timm `{model}`{blocks} ({arguments}), {millions:.1f} M parameters, no head |
| images | RGB, {images}, bicubic, whole image |
| mean | {mean} |
| std | {std} |
{outputs}
{norm}
## Loading
{warning}

```python
{snippet}```
{proof}

{teachers}
"""
