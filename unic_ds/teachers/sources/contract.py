"""Contract of a kind of teacher source: a `Source` of functions, with a name in `SOURCES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unic_ds import config
from unic_ds.teachers.adapters import TeacherModel
from unic_ds.teachers.sources.hub import Published

Build = Callable[[config.Teacher, int], TeacherModel]
"""A recipe's row and the side of the student's patch grid -> the teacher's model."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Functions of one kind of source; `row.parsed_source` has the parts of a row's `KIND:REST`.

    Only `read` is needed. All raise ValueError for a user's mistake: text that is not well formed,
    an unknown name, weights that are missing or do not fit, a size that the model does not take.
    """

    read: Build
    """The model with weights, on the CPU."""
    outline: Build | None = None
    """The model without weights, on the meta device; None: `read` is called for an outline too."""
    locate: Callable[[config.Teacher], Path] | None = None
    """The weight file on this machine, without network; None: the tensors are hashed instead."""
    fetch: Callable[[config.Teacher], None] | None = None
    """Download the weight file; RuntimeError if the network fails. None: nothing to download."""
    own_size: Callable[[config.Teacher], int] | None = None
    """Side in pixels of the images that the weights were trained on, 0 if unknown."""
    check_weights: Callable[[config.Teacher, int], None] | None = None
    """Compare the weight file with the outline, without reading all of it."""
    published: Callable[[config.Teacher], Published] | None = None
    """Repository and file names of published weights; None: its weights are the user's own."""
