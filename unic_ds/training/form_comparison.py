"""The work of `unic-ds forms`: compare a student with its exports on images of its run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from glob import escape
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config
from unic_ds.config import recipes
from unic_ds.evaluate.features import FILLER
from unic_ds.evaluate.table import NEEDS
from unic_ds.files.printable import printable
from unic_ds.harness import models
from unic_ds.harness.image_sets import SampledImages, find_images
from unic_ds.models.model_folder import ModelFolder
from unic_ds.training import student_folder
from unic_ds.training.hand_over import BATCH, QUERIES, labelled_of
from unic_ds.training.setup import noise_images
from unic_ds.weights.export import library_of
from unic_ds.weights.formats import FORMATS, form_table
from unic_ds.weights.formats.folder import Labelled
from unic_ds.weights.formats.forms import Form, measure, read_form


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The images that forms are compared on."""

    batches: Mapping[int, Sequence[Tensor]]
    """uint8 B3HW by side."""
    bank: int
    """First batches, which only kNN uses."""
    labelled: Labelled | None
    notes: list[str]
    """Sentences on the images."""


def compare(source: Path, folders: Sequence[Path], *, threads: int) -> str:
    """Table of the student of a run or model folder and its exports; progress goes to stderr.

    Without `folders`: the exports beside the student's folder. `threads`: those of each form; 0:
    two, or one on a machine with one core. ValueError for what cannot be compared, RuntimeError if
    a form does not run.
    """
    cores = form_table.cores()
    if not 0 <= threads <= cores:
        raise ValueError(
            f"--threads is {threads}, but this process may use {cores} cores; give 1 to {cores}"
        )
    with redirect_stdout(sys.stderr):
        try:
            path = models.model_folder_of(source, student_folder.from_checkpoint)
        except ValueError as error:
            raise ValueError(f"{str(source)!r} cannot be compared: {error}") from None
        forms = find_forms(path, folders)
        found = ModelFolder(path)
        cfg = recipes.read(found.run / "config.yaml") if found.run else None
        pictures = pictures_of(cfg, list(dict.fromkeys(form.size for form in forms)))
        threads, load = threads or min(2, cores), os.getloadavg()[0]
        try:
            rows = measure(
                forms,
                pictures.batches,
                bank=pictures.bank,
                threads=threads,
                say=lambda text: print(printable(text), flush=True),
            )
        except RuntimeError as error:
            raise RuntimeError(f"{error}; export it again, or leave it out") from None
    return form_table.render(
        rows,
        labelled=pictures.labelled,
        threads=threads,
        notes=[*pictures.notes, *busy(load, os.cpu_count() or 1)],
    )


def busy(load: float, count: int) -> list[str]:
    """A warning if more than a quarter of a machine's cores had work before the measurement."""
    if load <= count / 4:
        return []
    return [
        f"other programs kept the machine busy (load average {load:.1f} on {count} cores): times"
        " are longer than on an idle one, and ratios may differ"
    ]


def find_forms(path: Path, folders: Sequence[Path]) -> list[Form]:
    """The student in a model folder, and its exports; ValueError if there are none."""
    student = read_form(path, "student", FORMATS["timm"].library)
    folders = folders or exports_beside(path)
    full = [folder.resolve() for folder in (path, *folders)]
    for folder, resolved in zip(folders, full[1:], strict=True):
        if full.count(resolved) > 1:
            raise ValueError(f"{str(folder)!r} would be compared with itself; give it once")
    names = [student.name, *(folder.absolute().name for folder in folders)]
    return [
        student,
        *(
            read_form(folder, str(folder) if names.count(name) > 1 else name)
            for folder, name in zip(folders, names[1:], strict=True)
        ),
    ]


def exports_beside(path: Path) -> list[Path]:
    """Exports beside a model folder, as unic-ds export names them; ValueError if there are none."""
    full = path.absolute()
    known = {form.library: form for form in FORMATS.values()}
    found = []
    for folder in sorted(full.parent.glob(f"{escape(full.name)}_*")):
        form = known.get(library_of(folder))
        if form and form.reference:
            print(f"{printable(folder)} is left out: {form.title} has no tokens of the student")
        elif form:
            found.append(folder)
    if not found:
        raise ValueError(
            f"{str(path)!r} has no exports beside it; make some by unic-ds export, or name folders"
        )
    return found


def pictures_of(cfg: config.Config | None, sides: Sequence[int]) -> Pictures:
    """Images at some sides: labelled ones of a run, otherwise any of it, otherwise noise."""
    first, *_ = sides
    if cfg is None:
        noise_B3HW = noise_images(first)
        return Pictures(
            batches={side: [resized(noise_B3HW, side)] for side in sides},
            bank=0,
            labelled=None,
            notes=[
                f"kNN: not measured, as the student is of no run whose images are known;"
                f" cosine and fidelity to the student: on {len(noise_B3HW)} images of noise"
            ],
        )
    labelled = {side: found for side in sides if (found := labelled_of(cfg, side))}
    if not labelled:
        batches = {side: unlabelled(cfg, side) for side in sides}
        count = sum(map(len, batches[first]))
        return Pictures(
            batches=batches,
            bank=0,
            labelled=None,
            notes=[
                f"kNN: not measured, {NEEDS}; cosine and fidelity to the student: on {count} images"
                " of the run"
            ],
        )
    known = labelled[first]
    bank = sum(count <= known.train for count in accumulate(map(len, known.batches)))
    val = len(known.label_N) - known.train
    return Pictures(
        batches={side: found.batches for side, found in labelled.items()},
        bank=bank,
        labelled=known,
        notes=[
            f"kNN: k={known.neighbours}, {known.train} training and {val} validation images of the"
            f" run; cosine and fidelity to the student: on these {val}"
        ],
    )


def unlabelled(cfg: config.Config, side: int) -> list[Tensor]:
    """Images of a run: of its validation images if there are some."""
    train, val = find_images(cfg)
    few = replace(cfg, eval=replace(cfg.eval, batch=BATCH))
    images = SampledImages(train if val is None else val, few, QUERIES, labelled=False)
    return [
        batch.images[side][torch.from_numpy(batch.place_B != FILLER)].cpu()
        for batch in images.batches([side])
    ]


def resized(image_B3HW: Tensor, side: int) -> Tensor:
    """Images at another side."""
    if image_B3HW.shape[-1] == side:
        return image_B3HW
    larger = F.interpolate(image_B3HW.float(), (side, side), mode="bicubic", antialias=True)
    return larger.round().clamp(0, 255).to(torch.uint8)
