"""Time and cost of a run, as far as its log has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unic_ds.config import extension
from unic_ds.report.run_record import RunRecord, Series


@dataclass(frozen=True)
class Cost:
    """Hours of training, and what they were spent on."""

    seconds: float
    """Wall time of the logged steps and of the probes between them."""
    ranks: int | None
    """Processes, one for each GPU; None if the run folder does not say."""
    device: str
    """Name of the GPU, `GPU` for one whose name is not known, `CPU`, or "": not recorded."""
    cores: int | None = None
    """CPU cores of a rank, for a run without GPUs."""

    @property
    def unit(self) -> str:
        """Unit of `hours`."""
        if self.ranks is None:
            return "hours"
        if self.device == "CPU":
            return "core hours" if self.cores else "process hours (CPU)"
        return "GPU hours" if self.device else "rank hours"

    @property
    def hours(self) -> float:
        """Hours of all GPUs, or of all cores."""
        return self.seconds / 3600 * (self.ranks or 1) * (self.cores or 1)

    @property
    def counted(self) -> str:
        """Sentence that says how the hours were counted."""
        ranks = (
            "the number of ranks is not recorded, so these are hours of the whole run"
            if self.ranks is None
            else f"times {self.ranks} {'rank' if self.ranks == 1 else 'ranks'}"
        )
        cores = f" of {self.cores} cores" if self.cores and self.device == "CPU" else ""
        return (
            "Time between log lines (images of the steps over images per second) and time of"
            f" probes, {ranks}{cores}. Start, checkpoints, evaluation, and steps that were trained"
            " again after a resume are not counted."
        )


def of(record: RunRecord) -> Cost | None:
    """The cost of a run; None if its log has no rates."""
    seconds = training_seconds(record)
    if seconds is None:
        return None
    device = device_of(record)
    cores = number(record.start.get("cores")) if device == "CPU" else None
    return Cost(seconds, ranks_of(record), device, cores)


def training_seconds(record: RunRecord) -> float | None:
    """Seconds of the logged steps, and of probes; None without any."""
    rate = record.series.get("images_per_s")
    if rate is None or not len(rate.step_N):
        return None
    steps_N = np.diff(rate.step_N, prepend=0)
    counts_N = np.isfinite(rate.value_N) & (rate.value_N > 0)
    seconds_N = steps_N[counts_N] * record.settings.optim.batch_size / rate.value_N[counts_N]
    return float(seconds_N.sum()) + total(record.series.get("probe_s"))


def total(series: Series | None) -> float:
    """Sum of the finite values of a series; 0 without one."""
    return 0.0 if series is None else float(series.value_N[np.isfinite(series.value_N)].sum())


def ranks_of(record: RunRecord) -> int | None:
    """Ranks of the latest start, or of the newest checkpoint."""
    if found := number(record.start.get("ranks")):
        return found
    saved = extension.checkpoints(record.folder)
    facts = extension.read_facts(saved[-1]) if saved else {}
    return number(facts.get("ranks")) or len(record.heartbeats) or None


def device_of(record: RunRecord) -> str:
    """Device of a rank, by its start; by its log if that has a GPU's utilisation."""
    device = record.start.get("device")
    if isinstance(device, str) and device:
        return "CPU" if device == "cpu" else device
    return "GPU" if "mfu" in record.series else ""


def number(value: object) -> int | None:
    """A positive whole number, None for anything else."""
    return value if type(value) is int and value > 0 else None
