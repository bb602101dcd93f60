"""Section of a report on the comparison of teachers that a run folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unic_ds.files import read_limited, read_text, run_files
from unic_ds.report import page_pictures
from unic_ds.report.page_pictures import Picture

MOST = 40
"""Rows of a table."""
PICTURE_BYTES = 150_000
"""Bytes of a picture of all runs together, before base64."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class TeacherComparison:
    """The tables and the picture of a comparison, and sentences about what cannot be shown."""

    run: str
    tables: Sequence[Table]
    picture: Picture | None
    problems: Sequence[str]


def read(folders: Sequence[Path], labels: Sequence[str]) -> list[TeacherComparison]:
    """The comparisons of the run folders that have one."""
    pairs = [
        (folder, label)
        for folder, label in zip(folders, labels, strict=True)
        if (folder / run_files.COMPARISON).is_file()
    ]
    return [of_folder(folder, label, PICTURE_BYTES // len(pairs)) for folder, label in pairs]


def of_folder(folder: Path, label: str, budget: int) -> TeacherComparison:
    """The comparison in a folder; its picture has at most `budget` bytes."""
    tables: list[Table] = []
    picture, problems = None, []
    try:
        tables = tables_of(json.loads(read_text(folder / run_files.COMPARISON)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        problems.append(
            f"{run_files.COMPARISON} is no comparison of teachers; unic-ds teachers compare writes"
            " it anew"
        )
    try:
        file = folder / run_files.COMPARISON_PICTURE
        image = page_pictures.decoded(read_limited(file, page_pictures.FILE_BYTES))
        picture = page_pictures.shown(
            image, run=label, title="Likeness of teachers", kind="teachers", budget=budget
        )
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        problems.append(f"{run_files.COMPARISON_PICTURE} is left out: {why}")
    return TeacherComparison(label, tables, picture, problems)


def tables_of(found: Mapping[str, Any]) -> list[Table]:
    """Teachers, pairs and the selection; an error for anything that is no comparison."""
    teachers = [
        [name, number(row["gflops"]), number(row["parameters"] / 1e6), kind]
        + [number(x[key]) for key in ("width", "rankme", "participation", "components")]
        for name, row in found["teachers"].items()
        for kind, x in row["tokens"].items()
    ]
    measures = ("cka", "mutual_knn", "r2_of_second", "r2_of_first")
    pairs = [
        [pair["first"], pair["second"], pair["kind"], *(number(pair[key]) for key in measures)]
        for pair in found["pairs"]
    ]
    chosen = found["selection"]
    steps = [[x["teacher"], number(x["coverage"]), number(x["cost"])] for x in chosen["steps"]]
    steps += [[name, f"left out: it {why}", ""] for name, why in chosen["left_out"].items()]
    budget = chosen.get("budget")
    within = "" if budget is None else f" within {number(budget)} GFLOPs"
    spectrum = ("Width", "RankMe", "Participation ratio", "Components of 90 %")
    likeness = ("CKA", "Mutual kNN", "R2 of B by A", "R2 of A by B")
    return [
        Table(
            f"Teachers, {number(found['images'])} images",
            ("Teacher", "GFLOPs", "M parameters", "Tokens", *spectrum),
            teachers[:MOST],
        ),
        Table("Pairs", ("A", "B", "Tokens", *likeness), pairs[:MOST]),
        Table(f"Selection{within}", ("Add", "Coverage", "GFLOPs"), steps[:MOST]),
    ]


def number(value: float | None) -> str:
    """A number at three digits; - for None."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3g}"
