"""Hand a student over: from a run or a model folder to a format that the next tool loads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from unic_ds import config, data
from unic_ds.config import recipes
from unic_ds.config.option import nearest
from unic_ds.evaluate.features import FILLER
from unic_ds.files import tensor_files
from unic_ds.files.printable import printable
from unic_ds.harness import models, text_towers
from unic_ds.harness.image_sets import SampledImages, can_evaluate, find_images
from unic_ds.harness.students import check_side, read_statistics
from unic_ds.models.encoder import grid_of
from unic_ds.models.ladder import rung_blocks
from unic_ds.models.ladder_description import Description
from unic_ds.models.model_folder import LADDER, STATISTICS, ModelFolder, encoder_of
from unic_ds.models.student import ladder_on
from unic_ds.training import student_folder
from unic_ds.training.pruned_student import MOST, further, prune
from unic_ds.training.setup import noise_images, sample_images
from unic_ds.weights.card import DISTILLED
from unic_ds.weights.card_names import FILE
from unic_ds.weights.export import export, refuse_foreign
from unic_ds.weights.formats import FORMATS, folder, verify
from unic_ds.weights.formats.handover import Handover, Precision, Predictions, TextSide
from unic_kernels.ops import REFERENCE

BANK, QUERIES, BATCH = 1000, 500, 50
"""Training and validation images of a kNN before and after quantisation, and those of a batch."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """An export that is asked for."""

    source: Path
    """A run folder, or a model folder."""
    to: str = "timm"
    out: str = ""
    """The new folder; empty: beside the student's, named after the format."""
    quantize: Precision = ""
    keep: tuple[str, ...] = ()
    """Teachers whose predictions are outputs."""
    size: int = 0
    """Side of the images that positions are resampled to; 0: the student's."""
    prune: float = 0.0
    """Share of each block's heads and MLP channels that goes."""

    def __post_init__(self) -> None:
        if not 0 <= self.prune <= MOST:
            raise ValueError(
                f"--prune is {self.prune:g}; give a share in (0, {MOST}], or 0 for none"
            )
        if self.prune and self.to in ("hf", "openclip"):
            raise ValueError(
                f"--prune has no form in {self.to}, whose models have as many heads as fill their"
                " width; choose --to timm, onnx or export"
            )

    @property
    def suffix(self) -> str:
        """The end of the default folder's name."""
        size = f"{self.size}px" if self.size else ""
        pruned = f"pruned{100 * self.prune:g}" if self.prune else ""
        parts = [self.to, size, pruned, self.quantize]
        return "_".join(filter(None, parts))


def hand_over(request: Request) -> Path:
    """Export a student; return the folder.

    A run that is not finished gives its newest checkpoint's. ValueError for what cannot be
    exported, RuntimeError if the proof fails.
    """
    form = FORMATS[request.to]
    form.check(request.to, quantise=request.quantize, predict=bool(request.keep))
    with redirect_stdout(sys.stderr):  # a script reads the exported folder's path
        source = request.source
        changed = request.size or request.prune
        if request.to == "timm" and not changed and not is_model_folder(source):
            if request.out:
                refuse_source(Path(request.out), source)
            return from_run(request)
        try:
            found = ModelFolder(models.model_folder_of(source, student_folder.from_checkpoint))
        except ValueError as error:
            raise ValueError(f"{str(source)!r} cannot be exported: {error}") from None
        out = Path(request.out) if request.out else beside(found.path, request.suffix)
        refuse_source(out, found.path)
        return from_folder(request, found, out)


def refuse_source(out: Path, *sources: Path) -> None:
    """ValueError if the new folder is one that the export is made of, or a run's student."""
    full = out.resolve()
    if full in [source.resolve() for source in sources]:
        raise ValueError(f"{str(out)!r} is what would be exported; choose another folder")
    if full.name == "student" and (full.parent / "config.yaml").is_file():
        raise ValueError(f"{str(out)!r} is the student of a run; choose another folder")


def is_model_folder(path: Path) -> bool:
    """True if a folder holds an encoder and its config."""
    return (path / models.WEIGHTS).is_file() and (path / models.CONFIG).is_file()


def beside(path: Path, suffix: str) -> Path:
    """The folder beside another one, of its name and a suffix."""
    full = path.absolute()
    return (path if path.name else full).with_name(f"{full.name}_{suffix}")


def from_run(request: Request) -> Path:
    """timm's folder of a run's newest checkpoint."""
    cfg, _ = student_folder.newest_stage(request.source)
    sample = sampler(cfg)

    def prove(part: Path) -> None:
        encoder = ModelFolder(part).encoder()
        verify.prove(
            FORMATS["timm"], Handover(cfg=cfg.student, encoder=encoder, sample=sample), part
        )

    return student_folder.from_checkpoint(request.source, out=request.out, prove=prove)


def sampler(cfg: config.Config) -> Callable[[int], Tensor]:
    """Function of a side in pixels: images spread over a run's training images."""
    return sample_images(cfg, data.scan(cfg.data.train))


def from_folder(request: Request, found: ModelFolder, out: Path) -> Path:
    """An export of a model folder."""
    form, encoder, student = FORMATS[request.to], found.encoder(), found.student
    description = found.description(encoder)
    known = description if isinstance(description, Description) else None
    cfg = recipes.read(found.run / "config.yaml") if found.run else None
    if request.size:
        check_side(request.size, encoder, name=student.model)
        student = replace(student, size=request.size)
    text = text_of(request.keep, description, student) if request.to == "openclip" else None
    keep = (text.teacher,) if text else request.keep
    exported = encoder_of(student, encoder.state_dict(), found.named)
    origin = known.origin if known else ""
    if request.prune:
        refuse_foreign(out, form.files | {FILE}, library=form.library)  # before it takes minutes
        exported, student = prune(exported, student, request.prune, cfg, named=found.named)
        origin = f"{origin or DISTILLED}, pruned by {100 * request.prune:g} % and not trained since"
    handover = Handover(
        cfg=student,
        encoder=exported,
        sample=sampler(cfg) if cfg else noise_images,
        predictions=predictions_of(keep, found, description) if keep else None,
        text=text,
        teachers=known.teachers if known else {},
        origin=origin,
        licence=known.licence if known else "",
        real_images=cfg is not None,
    )
    if request.to == "timm":
        to_timm(handover, found, description, out)
        if request.prune:
            print(further(student, out, changed=bool(request.size)))
        return out
    labelled = labelled_of(cfg, student.size) if request.quantize and cfg else None
    for note in folder.write(
        request.to, handover, out, quantise=request.quantize, labelled=labelled
    ):
        print(note)
    return out


def predictions_of(
    names: Iterable[str], found: ModelFolder, description: Description | str
) -> Predictions:
    """Predictions of some teachers' features; ValueError for a teacher that the ladder has not."""
    if isinstance(description, str):
        raise ValueError(f"--keep_projectors: {found.named} has no known ladder: {description}")
    check_names(names, description)
    encoder = found.encoder()
    full = found.ladder(encoder, description).export_state_dict()
    depth, chosen = len(encoder.blocks), {name: description.heads[name] for name in names}
    rungs = [head.rungs or description.ladder.rungs for head in chosen.values()]
    ends = depth - 1 in [rung_blocks(text, depth)[-1] for text in rungs]
    heads = chosen if ends else description.heads  # a ladder ends at the last block
    ladder = ladder_on(encoder, description.ladder, heads, REFERENCE)
    with torch.no_grad():
        for name, value in ladder.export_state_dict().items():
            value.copy_(full[name])
    norms = read_statistics(found, description, torch.device("cpu"))
    return Predictions(ladder.requires_grad_(False).eval(), tuple(chosen), norms)


def check_names(names: Iterable[str], description: Description) -> None:
    """ValueError for a name of `--keep_projectors` that is no teacher of the ladder."""
    known = list(description.heads)
    for name in names:
        if name not in known:
            raise ValueError(
                f"--keep_projectors names {printable(name, 60)!r}{nearest(name, known)}; the"
                f" ladder's teachers are {', '.join(known)}"
            )


def text_of(
    keep: Sequence[str], description: Description | str, student: config.Student
) -> TextSide:
    """The text tower of the teacher that is kept, or of the only one that has one.

    ValueError if there is none, or the choice is open.
    """
    if isinstance(description, str):
        raise ValueError(f"--to openclip needs the student's ladder: {description}")
    check_names(keep, description)
    sources = {name: source_of(description.teachers.get(name, {})) for name in description.heads}
    known = keep or [name for name in sources if text_towers.was_with_text(sources[name])]
    if len(known) != 1 or "cls" not in description.heads[known[0]].kinds:
        raise ValueError(
            "--to openclip needs one teacher with a text tower, whose CLS tokens were distilled;"
            f" name it by --keep_projectors (teachers: {', '.join(description.heads)})"
        )
    (name,), facts = known, description.teachers.get(known[0], {})
    block = str(facts.get("block", "output"))
    row = config.Teacher(name=name, source=source_of(facts), block=block)
    tower = text_towers.read(row, grid=grid_of(student), device=torch.device("cpu"))
    state = {k: v for k, v in tower.model.state_dict().items() if not k.startswith("visual.")}
    inner = getattr(tower.tokenize, "tokenizer", None)  # of transformers, or open_clip's own

    def save_tokenizer(part: Path) -> None:
        if inner is not None:
            inner.save_pretrained(part)

    return TextSide(
        teacher=name,
        settings=open_clip.get_model_config(tower.arch),
        state=state,
        project=tower.project,
        embed=tower.embed,
        save_tokenizer=save_tokenizer,
    )


def source_of(facts: Mapping[str, object]) -> str:
    """The source of a teacher in ladder.json, or an empty text."""
    return str(facts.get("source", ""))


def to_timm(
    handover: Handover, found: ModelFolder, description: Description | str, out: Path
) -> Path:
    """timm's folder of a student at another size, with ladder and statistics."""
    names = [name for name in (LADDER, STATISTICS) if name in found.files]
    known = description if isinstance(description, Description) else None
    return export(
        handover.encoder.state_dict(),
        config.Config(student=handover.cfg),
        handover.sample(handover.cfg.size),
        out,
        teachers=handover.teachers,
        extras={name: tensor_files.read(found.files[name]) for name in names},
        description=known and replace(known, origin=handover.origin),
        origin=handover.origin,
        licence=handover.licence,
        prove=lambda part: verify.prove(FORMATS["timm"], handover, part),
    )


def labelled_of(cfg: config.Config, size: int) -> folder.Labelled | None:
    """Labelled images of a run for a kNN, or None if it has none."""
    train, val = find_images(cfg)
    if val is None or not can_evaluate(train, val):
        return None
    bank, queries = (
        min(asked or most, most)
        for asked, most in ((cfg.eval.max_train, BANK), (cfg.eval.max_val, QUERIES))
    )
    few = replace(cfg, eval=replace(cfg.eval, batch=BATCH))
    batches, labels, counts = list[Tensor](), list[Tensor](), list[int]()
    for source, most in ((train, bank), (val, queries)):
        images, rows = SampledImages(source, few, most), 0
        for batch in images.batches([size]):
            read_B = torch.from_numpy(batch.place_B != FILLER)
            batches.append(batch.images[size][read_B].cpu())
            labels.append(torch.as_tensor(batch.annotations["labels"])[read_B])
            rows += int(read_B.sum())
        counts.append(rows)
    neighbours = cfg.eval.neighbours[0]
    return folder.Labelled(batches, torch.cat(labels), counts[0], neighbours)
