"""Tasks and data folders of an evaluation, parsed from text. Stdlib only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unic_ds.config.evaluation import TASKS
from unic_ds.config.option import nearest
from unic_ds.files.printable import printable


def tasks(text: str, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Parse comma-separated tasks; ValueError for one that neither `TASKS` nor `more` has."""
    found = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    known = [*TASKS, *more]
    if not found:
        raise ValueError(f"no task is named; give some of {', '.join(known)}")
    for name in found:
        if name not in known:
            raise ValueError(
                f"there is no task {printable(repr(name))}{nearest(name, known)}; choose from"
                f" {', '.join(known)}"
            )
    return found


def folders(text: str, *, plugins: bool = False) -> dict[str, Path]:
    """Parse --eval.data: task -> folder; "" has the folder of all other tasks.

    Comma-separated TASK=DIR, or DIR for all tasks. ValueError for a folder that does not exist, a
    task that is given twice or, unless there are `plugins`, which may add tasks, is unknown.
    """
    found: dict[str, Path] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        task, equals, path = part.partition("=")
        if not equals or Path(part).is_dir():
            task, path = "", part
        if task in found:
            raise ValueError(f"--eval.data has two folders for {task or 'all tasks'}; give one")
        if task and not plugins:
            tasks(task)
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"--eval.data {printable(repr(path))} is no folder; give one")
        found[task] = folder
    return found
