"""MLflow: params, metrics and artifacts of a run, without a model registry.

The store is that of MLFLOW_TRACKING_URI, else files in RUN/mlruns: they need no database, which
MLflow would take ten seconds to create. Points cannot be rewritten, so steps that the store has
of an earlier start are not sent again.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray

from unic_ds.config import overrides
from unic_ds.training.trackers.groups import group_of
from unic_ds.training.trackers.record_ids import read_ids, store
from unic_ds.training.trackers.tracker import End, Row, Start

SERVICE = "mlflow"
EVERY_LINE = "samples"
"""A value that every log line has, and that is finite."""
STATUS: dict[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
QUANTILES = (10, 50, 90)
"""Percentiles that stand for a histogram, which MLflow has not."""

BATCH, LONGEST = 100, 500
"""Params of one request, and characters of a param's value, that every server takes."""

NOT_ALLOWED = re.compile(r"[^\w\-. /]", re.ASCII)


class Mlflow:
    """A run of MLflow, which one with the same id in trackers.json goes on with."""

    def __init__(self, start: Start):
        self.client = MlflowClient(tracking_uri(start.folder))
        known = read_ids(start.folder).get(SERVICE)
        resumed = known is not None and self.resume(known)
        self.run = known if known and resumed else self.create(start)
        self.logged = self.last_step() if resumed else 0

    def resume(self, record: str) -> bool:
        """Go on with a run; False if this store does not have it."""
        try:
            self.client.update_run(record, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def last_step(self) -> int:
        """The last step of a log line that the store has; 0 if it has none."""
        points = self.client.get_metric_history(self.run, plain(group_of(EVERY_LINE)))
        return max((point.step for point in points), default=0)

    def create(self, start: Start) -> str:
        """Create a run with its settings, and store its id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "unic_ds")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        record: str = self.client.create_run(experiment, run_name=start.name).info.run_id
        store(start.folder, SERVICE, record=record)
        for params in batches(overrides.flatten(overrides.to_dict(start.cfg))):
            self.client.log_batch(record, params=params)
        return record

    def scalars(self, row: Row, *, step: int) -> None:
        """Add the finite values, in their groups."""
        values = {name: x for name, x in row.items() if x is not None and math.isfinite(x)}
        self.add({group_of(name): value for name, value in values.items()}, step)

    def histogram(self, name: str, value_N: NDArray[np.floating], *, step: int) -> None:
        """Add percentiles."""
        found = zip(QUANTILES, np.percentile(value_N, QUANTILES), strict=True)
        self.add({f"{group_of(name)}_p{q}": float(value) for q, value in found}, step)

    def picture(self, name: str, image_HW3: NDArray[np.uint8], *, caption: str, step: int) -> None:
        """Add a PNG file, and its caption as a text file; one of an earlier start is replaced."""
        self.client.log_image(self.run, image_HW3, artifact_file=f"{plain(name)}_{step}.png")
        self.text(name, caption, step=step)

    def text(self, name: str, text: str, *, step: int) -> None:
        """Add a text file."""
        self.client.log_text(self.run, text, f"{plain(name)}_{step}.txt")

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each metric."""
        if step > self.logged:
            now = int(1000 * time.time())
            metrics = [Metric(plain(name), value, now, step) for name, value in values.items()]
            self.client.log_batch(self.run, metrics=metrics)

    def close(self, end: End) -> None:
        """End the run with its status; a later start goes on with it."""
        self.client.set_terminated(self.run, STATUS[end])


def tracking_uri(folder: Path) -> str:
    """URI of the store: the environment's, or that of files below a run folder."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow prefers a database
    return (folder / "mlruns").absolute().as_uri()


def batches(settings: Mapping[str, str]) -> Iterator[Sequence[Param]]:
    """Settings as params, as many as a request may have."""
    params = [Param(plain(name), value[:LONGEST]) for name, value in settings.items()]
    for at in range(0, len(params), BATCH):
        yield params[at : at + BATCH]


def plain(name: str) -> str:
    """A name of characters that MLflow allows."""
    return NOT_ALLOWED.sub("_", name)


open_tracker = Mlflow
