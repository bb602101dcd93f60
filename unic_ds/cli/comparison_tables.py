"""Output of `unic-ds teachers compare`, of the comparison as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unic_ds.cli import tables

CLASSES = 10
"""Classes that are printed."""


def show(found: Mapping[str, Any]) -> None:
    """Print all tables of a comparison."""
    count = found["images"]
    tables.show_table(
        teacher_rows(found),
        header=("teacher", "GFLOPs", "M params", "px", "summary token"),
        title=f"teachers, {count} images",
    )
    tables.show_table(
        spectrum_rows(found),
        header=("teacher", "tokens", "width", "norm", "sd", "RankMe", "PR", "n90", "dispersion"),
        title="features",
    )
    tables.show_table(
        pair_rows(found),
        header=("A", "B", "tokens", "CKA", "mutual kNN", "R2 of B by A", "R2 of A by B"),
        title="pairs",
    )
    show_strengths(found["labelled"])
    show_gradients(found["gradients"])
    show_selection(found["selection"])


def teacher_rows(found: Mapping[str, Any]) -> list[Sequence[object]]:
    """A row about each teacher."""
    return [
        (
            name,
            gflops(row["gflops"]),
            number(row["parameters"] / 1e6, 1),
            row["size"],
            row["summary"],
        )
        for name, row in found["teachers"].items()
    ]


def spectrum_rows(found: Mapping[str, Any]) -> list[Sequence[object]]:
    """A row about the features of each teacher and kind of token."""
    return [
        (
            name,
            kind,
            x["width"],
            number(x["norm_mean"], 2),
            number(x["norm_std"], 2),
            number(x["rankme"], 1),
            number(x["participation"], 1),
            x["components"],
            number(x["dispersion"], 2),
        )
        for name, row in found["teachers"].items()
        for kind, x in row["tokens"].items()
    ]


def pair_rows(found: Mapping[str, Any]) -> list[Sequence[object]]:
    """A row about each pair of teachers and kind of token."""
    measures = ("cka", "mutual_knn", "r2_of_second", "r2_of_first")
    return [
        (pair["first"], pair["second"], pair["kind"], *(number(pair[key], 2) for key in measures))
        for pair in found["pairs"]
    ]


def show_strengths(labelled: Mapping[str, Any] | None) -> None:
    """Print the kNN accuracy of each teacher, and the classes on which they differ most."""
    if labelled is None:
        print("strengths are left out: fewer than two classes of two images or more\n")
        return
    names = list(labelled["accuracy"])
    shown = labelled["classes"][:CLASSES]
    rows = [
        (x["name"], x["images"], *(number(x["accuracy"][n], 1) for n in names), best_of(x, names))
        for x in shown
    ]
    overall = (number(labelled["accuracy"][name], 1) for name in names)
    rows.insert(0, ("all classes", labelled["images"], *overall, ""))
    tables.show_table(
        rows,
        header=("class", "images", *names, "best"),
        title=f"leave-one-out kNN in %; the {len(shown)} of {len(labelled['classes'])} classes on"
        " which teachers differ most",
    )
    counts = {name: sum(x["best"] == [name] for x in labelled["classes"]) for name in names}
    print("best alone on " + ", ".join(f"{n} classes: {name}" for name, n in counts.items()) + "\n")


def best_of(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The best teachers of a class."""
    return "all" if len(row["best"]) == len(names) else ", ".join(row["best"])


def show_gradients(found: Mapping[str, Any] | None) -> None:
    """Print the cosines between the teachers' gradients."""
    if found is None:
        return
    rows = [
        (name, *(number(x, 3) for x in values))
        for name, values in zip(found["teachers"], found["cosine"], strict=True)
    ]
    tables.show_table(
        rows,
        header=("cosine of gradients", *found["teachers"]),
        title=f"gradients of the teachers' losses at the student's last features,"
        f" {found['images']} images",
    )


def show_selection(found: Mapping[str, Any]) -> None:
    """Print the greedy selection, and the chosen teachers without each of them."""
    without = {row["teacher"]: row for row in found["without"]}
    rows = [
        (
            step["teacher"],
            number(step["coverage"], 3),
            gflops(step["cost"]),
            number(without[step["teacher"]]["coverage"], 3),
            number(without[step["teacher"]]["knn"], 1),
        )
        for step in found["steps"]
    ]
    rows.append(("all of these", number(found["coverage"], 3), "", "", number(found["knn"], 1)))
    budget = "" if found["budget"] is None else f" within {found['budget']:g} GFLOPs"
    tables.show_table(
        rows,
        header=("add", "coverage", "GFLOPs", "coverage without it", "kNN % without it"),
        title=f"selection{budget}",
    )
    for name, why in found["left_out"].items():
        print(f"left out: {name} {why}")


def number(value: float | None, digits: int) -> str:
    """A number at so many digits behind the point; - for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def gflops(value: float) -> str:
    """GFLOPs at three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
