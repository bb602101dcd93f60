"""Folder of an export: written beside, proven, and only then given its name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from unic_ds.evaluate.knn import Rows, knn_accuracies
from unic_ds.files import nearest_existing, replace_folder, write_atomic
from unic_ds.weights.card_names import FILE
from unic_ds.weights.export import refuse_foreign
from unic_ds.weights.formats import FORMATS, card, quantised, verify
from unic_ds.weights.formats.handover import Format, Handover, Outputs, Precision

ROOM = 3
"""Copies of the weights that fit on a disk before an export is begun."""


class Labelled(NamedTuple):
    """Labelled images for a kNN before and after quantisation."""

    batches: Sequence[Tensor]
    """uint8 B3HW at the student's side: training images, then validation images."""
    label_N: Tensor
    train: int
    """Images of the first part."""
    neighbours: int


def write(
    to: str,
    handover: Handover,
    out: Path,
    *,
    quantise: Precision = "",
    labelled: Labelled | None = None,
) -> list[str]:
    """Write the student to the folder `out` in a format; return what `quantise` changed.

    These are sentences, and none in fp32.

    ValueError if the student does not fit the format, `out` holds something else, or the disk has
    no room; RuntimeError if the proof fails. Nothing is left at `out` then, but an earlier export
    stays.
    """
    form = FORMATS[to]
    assert form.write, f"weights.export writes {to}"
    refuse_foreign(out, form.files | {FILE}, library=form.library)
    check_room(out, handover)
    part = out.with_name(f".{out.name}.partial")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    try:
        part.mkdir(parents=True)
        form.write(handover, part, quantise)
        notes = list[str]()
        if quantise:
            notes = measure(form, handover, part, labelled, quantise=quantise)
        else:
            verify.prove(form, handover, part)
        write_atomic(part / FILE, card.render(form, handover, notes, quantise=quantise))
        # Another process may have written it since.
        refuse_foreign(out, form.files | {FILE}, library=form.library)
        replace_folder(part, out)
    except OSError as error:
        raise OSError(f"{str(out)!r} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return notes


def check_room(out: Path, handover: Handover) -> None:
    """ValueError unless the disk has room for `ROOM` copies of the weights."""
    modules = filter(None, (handover.encoder, handover.predictions))
    nbytes = sum(v.nbytes for module in modules for v in module.state_dict().values())
    free = shutil.disk_usage(nearest_existing(out)).free
    if free < ROOM * nbytes:
        raise ValueError(
            f"{str(out)!r} needs {ROOM * nbytes / 1e6:.0f} MB for a while, but its disk has"
            f" {free / 1e6:.0f} MB left; free some, or give another --out"
        )


def measure(
    form: Format,
    handover: Handover,
    folder: Path,
    labelled: Labelled | None,
    *,
    quantise: Precision,
) -> list[str]:
    """Sentences on the difference of a precision from fp32, as a fresh process computes it.

    RuntimeError if the difference is so large that something is wrong.
    """
    batches = [*verify.batches_of(form, handover), handover.sample(handover.cfg.size)]
    count, more = len(batches), list(labelled.batches) if labelled else []
    exact = [verify.reference(handover, batch) for batch in batches]
    exact += [verify.cls_alone(verify.reference(handover, batch)) for batch in more]
    found = verify.run_fresh(form, folder, batches + more, whole=count)
    cosines = quantised.cosines(exact[:count], found[:count], quantise)
    rows = ", ".join(f"{name} {value:.5f}" for name, value in cosines.items())
    kind = "images of the run" if handover.real_images else "images of noise"
    notes = [f"mean cosine of {quantise} to fp32 on {kind}: {rows}"]
    if labelled:
        before, after = (knn(part[count:], labelled) for part in (exact, found))
        val = len(labelled.label_N) - labelled.train
        notes.append(
            f"kNN (k={labelled.neighbours}, {labelled.train} training and {val} validation images):"
            f" {before:.1f} % in fp32, {after:.1f} % in {quantise}"
        )
    return notes


def knn(outputs: Sequence[Outputs], labelled: Labelled) -> float:
    """kNN accuracy in % of CLS features."""
    cls_NC, label_N, train = verify.joined(outputs, "cls"), labelled.label_N, labelled.train
    bank, query = Rows(cls_NC[:train], label_N[:train]), Rows(cls_NC[train:], label_N[train:])
    (found,) = knn_accuracies(bank, query, ks=[labelled.neighbours]).values()
    return found
