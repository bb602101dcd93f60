"""Data sets of the tasks, read from the folder layouts in which they are published.

To add a layout, write a module with a function `open_sets` and give it a name in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from unic_ds.config import Config
from unic_ds.evaluate.eval_data import AnySet
from unic_ds.harness.layouts import (
    class_folders,
    coco,
    depth,
    robustness,
    segmentation,
    spair,
    transfer,
    unlabelled,
)

Sets = Mapping[str, AnySet]
"""`EvalData.sets` of a task."""

OpenSets = Callable[[Path, Config], Sets]
"""Opens the sets below a folder; ValueError, one sentence with the remedy, for a wrong layout.

Headers of all files are checked, so that a mistake is reported before any feature is computed.
"""

LAYOUTS: dict[str, OpenSets] = {
    "transfer": transfer.open_sets,
    "transfer_knn": transfer.open_sets,
    "robustness": robustness.open_sets,
    "segmentation": segmentation.open_sets,
    "depth": depth.open_sets,
    "detection": coco.open_sets,
    "correspondence": spair.open_sets,
    "rankme": unlabelled.open_sets,
}
"""Task -> its layout; a task without an entry has class folders."""


def layout_of(task: str) -> OpenSets:
    """The layout of a task's data."""
    return LAYOUTS.get(task, class_folders.open_sets)


def has_class_folders(task: str) -> bool:
    """True if a task can use the images of a run: class folders, or any images."""
    return layout_of(task) in (class_folders.open_sets, unlabelled.open_sets)


def open_sets(task: str, folder: Path, cfg: Config) -> Sets:
    """The sets of a task below a folder; ValueError as `OpenSets`."""
    return layout_of(task)(folder, cfg)
