"""Model card of an exported student, in Hugging Face's format.

It is written with the folder, and again when the run has been evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer

from unic_ds import __version__, config
from unic_ds.evaluate.comparison import Comparison
from unic_ds.evaluate.table import gain_text, label, text_of
from unic_ds.files import write_atomic
from unic_ds.files.printable import markdown
from unic_ds.files.tensor_files import Safetensors
from unic_ds.models.encoder import architecture, arguments, build_encoder, is_narrow
from unic_ds.models.model_folder import WEIGHTS
from unic_ds.teachers import licences
from unic_ds.teachers.licences import Terms
from unic_ds.weights import card_facts, card_names, narrow_code
from unic_ds.weights.card_facts import TeacherRow
from unic_ds.weights.card_names import FILE

PLAIN = re.compile(r"[A-Za-z0-9_ .,:;/()#=@+-]{,400}")
"""Text that Markdown and HTML show unchanged, unless it begins a line."""


def render(
    encoder: VisionTransformer,
    cfg: config.Config,
    teachers: Mapping[str, Mapping[str, Any]],
    origin: str = "",
    *,
    licence: str = "",
    comparison: Comparison | None = None,
) -> str:
    """Model card in Markdown, with a row for each teacher of the manifest or the settings.

    `origin` says where the weights are from, if no run has trained them, and `licence` is theirs.
    `comparison` has the results, if the student has been evaluated.
    """
    rows = card_facts.teacher_rows(cfg, teachers)
    data = card_facts.metadata(
        rows,
        licence=licence,
        named=f"{cfg.student.model}-{cfg.recipe or 'custom'}",
        results=card_facts.eval_results(comparison, cfg) if comparison else (),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        introduction(encoder, cfg, origin),
        loading(cfg.student, rows, licence),
        teacher_table(rows),
        *([training(cfg)] if cfg.teachers else []),
        results(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def rewrite(
    folder: Path,
    cfg: config.Config,
    teachers: Mapping[str, Mapping[str, Any]],
    comparison: Comparison,
) -> None:
    """Write the card of a run's exported student again, with the results of its evaluation."""
    with torch.device("meta"):
        encoder = build_encoder(cfg.student)
    weights = Safetensors(folder / WEIGHTS)
    norm = {name: weights[f"norm.{name}"] for name in encoder.norm.state_dict()}
    encoder.norm.load_state_dict(norm, assign=True)
    write_atomic(folder / FILE, render(encoder, cfg, teachers, comparison=comparison))


def introduction(encoder: VisionTransformer, cfg: config.Config, origin: str) -> str:
    """Title, the method, and a table of facts."""
    student = cfg.student
    grid = encoder.patch_embed.grid_size[0]
    text = INTRODUCTION.format(
        origin=cell(origin or f"{DISTILLED} ({cfg.recipe or 'a custom run'})"),
        model=student.model,
        blocks=block_text(student),
        millions=sum(p.numel() for p in encoder.parameters()) / 1e6,
        width=encoder.num_features,
        size=student.size,
        grid=grid,
        mean=", ".join(map(str, student.mean)),
        std=", ".join(map(str, student.std)),
        norm=f"\n{INITIAL_NORM}" if has_initial_norm(encoder) else "",
    )
    return text.rstrip()


def block_text(student: config.Student) -> str:
    """Text on the blocks of a student that are narrower than the model's."""
    parts = {"attention heads": student.heads, "MLP channels": student.mlp_width}
    given = [f"{count} {name}" for name, count in parts.items() if count]
    return f" with {' and '.join(given)} in each block" if given else ""


def has_initial_norm(encoder: VisionTransformer) -> bool:
    """True if the final norm has its initial affine, scale 1 and offset 0."""
    return all(
        bool((value == float(name == "weight")).all())
        for name, value in encoder.norm.named_parameters()
    )


def loading(student: config.Student, rows: Sequence[TeacherRow], licence: str) -> str:
    """The code that loads the student, below the warnings that follow from the licences."""
    return LOADING.format(
        warning="\n>\n".join(warning_lines(rows, licence=licence)),
        imports=narrow_code.IMPORTS if is_narrow(student) else "",
        model=architecture(student),
        arguments=argument_text(student),
        hub=DOWNLOADED if is_narrow(student) else HUB,
    )


def argument_text(student: config.Student) -> str:
    """Arguments of timm.create_model, as a program has them."""
    return ", ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
        for key, value in arguments(student).items()
    )


def warning_lines(rows: Sequence[TeacherRow], *, licence: str = "") -> Iterator[str]:
    """Yield a quoted paragraph on the weights' own licence, if they have one, and on the teachers'.

    One for each kind of terms, the strictest first; none on permissive ones if others bind.
    """
    found: list[tuple[Terms, str, str]] = []
    if licence:
        own = f"{card_names.WEIGHTS} ({linked(licence)})"
        found.append((licences.licence_class(licence), own, ""))
    for terms, of in card_facts.rows_by_terms(rows):
        names = ", ".join(f"{cell(row.name)} ({linked(row.licence)})" for row in of)
        found.append((terms, names, f"; {MAY}"))
    binding = [line for line in found if line[0] != "permissive"]
    for terms, names, may in binding or found or [("unknown", card_names.WEIGHTS, "")]:
        yield f"> {WARNINGS[terms].format(names=names, may=may)}"


def linked(licence: str) -> str:
    """A licence as the weights name it, with a link to its text if that is known."""
    link = licences.identify(licence).link
    text = cell(licence) or "no licence stated"
    return f"[{text}]({link})" if link else text


def teacher_table(rows: Sequence[TeacherRow]) -> str:
    """The teachers with sources, licences and hashes."""
    lines = [
        f"| {cell(row.name)} | {code(row.source)} | {cell(row.licence or 'unknown')} |"
        f" {row.terms} | {code(row.hash) if row.hash else '-'} |"
        for row in rows
    ]
    return TEACHERS.format(rows="\n".join(lines) or "| - | - | - | - | - |")


def training(cfg: config.Config) -> str:
    """Data, main settings, the command that repeats the run, and all settings."""
    rows = [f"| {name} | {code(text)} |" for name, text in card_facts.main_settings(cfg)]
    text = card_facts.settings(cfg)
    longest = max(map(len, re.findall("`+", text)), default=0)
    return TRAINING.format(
        images=", validated on ".join(images_of(cfg.data)),
        versions=f"unic_ds {__version__}, torch {torch.__version__}, timm {timm.__version__}",
        rows="\n".join(rows),
        fence="`" * max(3, longest + 1),
        settings=text,
    )


def images_of(data: config.Data) -> Iterator[str]:
    """Yield the names of the images for training and, if there are some, for validation."""
    yield cell(card_facts.folder_name(data.train))
    if data.val:
        yield cell(card_facts.folder_name(data.val))
    elif data.val_share:
        yield f"{data.val_share:g} of them, left out"


def results(comparison: Comparison | None) -> str:
    """The table of the evaluation, and the protocol of each of the students' values."""
    if comparison is None or not comparison.rows:
        return f"## Results\n{NO_RESULTS}"
    measured = [m for m in comparison.roles if any(m in row.values for row in comparison.rows)]
    students = [m for m in comparison.named("student") if m in measured]
    gains = students if comparison.named("teacher") else []
    head = [cell(m) for m in measured] + ["student - best teacher" for _ in gains]
    lines = [f"| | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for row in comparison.rows:
        values = [text_of(row, m) for m in measured]
        values += [cell(gain_text(row, m, comparison)) for m in gains]
        lines.append(f"| {cell(label(row))} | {' | '.join(values)} |")
    protocols = [
        f"- {cell(label(row))}: {cell(row.protocols[m])}"
        for row in comparison.rows
        for m in students
        if row.protocols.get(m)
    ]
    return "\n".join(["## Results", RESULTS, "", *lines, "", *dict.fromkeys(protocols)]).rstrip()


def cell(text: str) -> str:
    """Text from outside for Markdown, escaped if it has characters that could be markup."""
    return text if PLAIN.fullmatch(text) else markdown(text)


def code(text: str) -> str:
    """Text from outside as code in Markdown; escaped text if it could end the code."""
    return f"`{text}`" if PLAIN.fullmatch(text) else markdown(text)


DISTILLED = "distilled by unic_ds"
INITIAL_NORM = "The final norm has its initial affine (scale 1, offset 0): it was not trained."
NO_RESULTS = "This student has not been evaluated."
RESULTS = "Frozen features on images that were not trained on; `-`: not measured."
MAY = "whether it extends to weights that were distilled from theirs is not settled"
WARNINGS: dict[Terms, str] = {
    "permissive": "**Licences:** {names} may be used for any purpose if their notices are kept.",
    "custom": "**Warning: conditions of their own.** The licence of {names} sets conditions for"
    " whoever uses or passes them on{may}. Read it first.",
    "non-commercial": "**Warning: not for commercial use.** The licence of {names} forbids"
    " commercial use{may}. Treat this model as non-commercial.",
    "research only": "**Warning: for research only.** The licence of {names} permits research"
    " alone{may}. Treat this model as research only.",
    "unknown": "**Warning: unknown licence.** The licence of {names} is not known, so nothing is"
    " known to be permitted. Ask the authors before you use or publish this model.",
}
INTRODUCTION = """\
# {model}, {origin}

One ViT that learned the features of several frozen teachers by the UNIC method (arXiv 2408.05088).

| | |
|---|---|
| architecture | timm `{model}`{blocks}, {millions:.1f} M parameters, no head |
| images | RGB, {size} x {size} px, bicubic, whole image (crop_pct 1.0) |
| mean | {mean} |
| std | {std} |
| features | {width} wide: CLS and a {grid} x {grid} grid of patch tokens, after the final norm |
{norm}"""
LOADING = """\
## Loading
{warning}

```python
{imports}import timm

model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
# the same by name:
model = timm.create_model(
    "{model}", checkpoint_path="THIS_FOLDER/model.safetensors", {arguments}
).eval()

transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
tokens = model.forward_features(images)  # prefix tokens (CLS first), then patches
```
Both ways were run when this folder was written, and gave the encoder's features to 1e-5 in fp32.
{hub}"""
HUB = 'From the hub it is `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)`.'
DOWNLOADED = "From the hub, download the folder (`hf download OWNER/NAME`), then load it so."
TEACHERS = """\
## Teachers
Their licences bear on what may be done with these weights. The hash is the SHA-256 of the tensors,
or of the file if that alone is known.

| teacher | source | licence | terms | hash |
|---|---|---|---|---|
{rows}"""
TRAINING = """\
## Training
Images: {images}. Their licences bear on these weights as well. Versions: {versions}.

| setting | value |
|---|---|
{rows}

The run is repeated by the settings below, in a file `settings.yaml` with your own paths:
```bash
deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json --recipe settings.yaml
```
<details><summary>All settings</summary>

{fence}yaml
{settings}
{fence}

</details>"""
