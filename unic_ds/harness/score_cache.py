"""Scores on disk: an evaluation that was killed does not repeat the tasks that it had finished.

A file per task, models, images and options; rank 0 reads and writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from unic_ds import __version__, dist
from unic_ds.config import Eval
from unic_ds.config.evaluation import TASKS
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import AnySet, EvalData
from unic_ds.evaluate.features import ImageSet, Model
from unic_ds.files import read_text, write_atomic
from unic_ds.process import console

WITH_MORE = ("zeroshot", "plugplay")
"""Tasks that depend on more than models, images and options: text towers, files of names.

So do those of plugins, whose code may change.
"""
MACHINERY = ("on", "tasks", "data", "cache", "batch")
"""Options on which no score depends."""


class ScoreCache:
    """A folder of scores; None: nothing is kept."""

    def __init__(self, root: Path | None):
        self.root = root

    def file_of(self, task: str, models: Sequence[Model], data: EvalData) -> Path | None:
        """The file of a task's scores; None if a model or a set has no identity.

        Every rank calls it.
        """
        identities = [found.identity for found in data.sets.values()] if self.root else []
        known = all(model.identity for model in models) and all(identities)
        if not self.root or not known or task in WITH_MORE or task not in TASKS:
            return None
        labels = [labels_of(found) for found in data.sets.values()]
        sets = [list(row) for row in zip(data.sets, identities, labels, strict=True)]
        shown = [(model.name, model.role, model.identity, model.size) for model in models]
        facts = [__version__, task, shown, sets, self.options(data.options), data.seed]
        # Heads are trained on a share of each rank, so their digits depend on the ranks.
        key = json.dumps([*facts, dist.world()], sort_keys=True)
        return self.root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    @staticmethod
    def options(options: Eval) -> dict[str, object]:
        """The options that decide scores."""
        return {key: value for key, value in asdict(options).items() if key not in MACHINERY}

    def read(self, file: Path | None) -> list[Score] | None:
        """The scores in a file, on every rank; None if there are none, or it is damaged."""
        found: list[Score] | None = None
        if file and dist.rank() == 0 and file.is_file():
            try:
                found = [Score(*row) for row in json.loads(read_text(file))]
            except (OSError, ValueError, TypeError) as error:
                console.say(f"{str(file)!r} cannot be read ({error}); the task is repeated")
        return dist.broadcast_object(found)

    def write(self, file: Path | None, scores: Sequence[Score]) -> None:
        """Keep scores, on rank 0; a line says why if they cannot be written."""
        if not file or not scores or dist.rank() != 0:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps([list(score) for score in scores]))
        except OSError as error:
            console.say(f"scores are not kept: {str(file)!r} cannot be written ({error.strerror})")


def labels_of(found: AnySet) -> str:
    """Hash of the classes and labels of a set, which its identity may lack."""
    digest = hashlib.sha256(json.dumps(found.classes).encode())
    if isinstance(found, ImageSet):
        digest.update(found.labels().tobytes())
    return digest.hexdigest()
