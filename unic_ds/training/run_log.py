"""The log of a run: JSON lines, TensorBoard and services, and a progress bar or plain lines.

Metrics stay on the device and cross to the host once per log line, averaged over its steps and all
ranks.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich import progress
from torch import Tensor

from unic_ds import dist
from unic_ds.config import Config
from unic_ds.files import run_files
from unic_ds.files.documents import json_lines
from unic_ds.planning.gpus import peak_tflops
from unic_ds.process import console
from unic_ds.training.trackers import ReportFailure, Trackers, openers
from unic_ds.training.trackers.jsonl_tracker import JsonLines
from unic_ds.training.trackers.tensorboard_tracker import TensorBoard
from unic_ds.training.trackers.tracker import End, Start, Tracker


class LogRow(TypedDict, total=False):
    """A line of log.jsonl. It also has `TEACHER/METRIC` for each teacher, all floats.

    After a probe it has `probe/NAME` of the student, and of each teacher `probe/NAME/TEACHER`.
    """

    step: int
    samples: int
    lr: float
    grad_norm: float | None
    loss: float
    data_wait_share: float
    images_per_s: float
    mem_gb: float
    skipped: int
    bad_images: int
    tflops: float
    mfu: float
    probe_s: float


class RunLog:
    """A run's log on every rank; only rank 0 writes."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        first: int,
        batch_size: int,
        flops_per_image: float,
        cfg: Config | None = None,
        report: ReportFailure | None = None,
        stops: tuple[type[Exception], ...] = (),
    ):
        """`first` is the next step; lines from there on, which a killed run left, are dropped.

        The services of `cfg` get it, too. `report` is called once for each of them that fails, and
        for TensorBoard. `stops` are exceptions after which the same process goes on.
        """
        self.steps, self.batch_size, self.flops = steps, batch_size, flops_per_image
        self.sums: Tensor | None = None
        self.names: list[str] = []
        self.samples: dict[str, Tensor] = {}  # values per image of the latest micro batch
        self.last: LogRow = {}
        self.probed: dict[str, float] = {}
        self.shown = ""  # the latest probe's values
        self.logged_step, self.logged_time, self.logged_wait = first - 1, time.monotonic(), 0.0
        self.sparse = bool(cfg and cfg.metrics_vary)  # not every step has every metric
        self.stops = stops
        self.writer = dist.rank() == 0
        self.bar: progress.Progress | None = None
        if self.writer:
            self.trackers = open_trackers(folder, first, cfg or Config(), report)
            self.open_bar(first)

    def open_bar(self, first: int) -> None:
        """Show a progress bar if stdout is a terminal and steps are left."""
        if sys.stdout.isatty() and first <= self.steps:
            self.bar = progress_bar()
            self.bar.start()
            self.task = self.bar.add_task(
                "", total=self.steps, completed=first - 1, loss="", speed=""
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.writer:
            if self.bar:
                self.bar.stop()
            self.trackers.close(self.end_of(error))

    def end_of(self, error: BaseException | None) -> End:
        """The end of a start by an exception, or after its last step."""
        if error is None:
            return "stopped" if self.logged_step < self.steps else "finished"
        return "stopped" if isinstance(error, (KeyboardInterrupt, *self.stops)) else "failed"

    def picture(self, name: str, image_HW3: NDArray[np.uint8], caption: str, step: int) -> None:
        """Give an image to the trackers; ranks that do not write ignore it."""
        if self.writer:
            self.trackers.each(
                lambda tracker: tracker.picture(name, image_HW3, caption=caption, step=step)
            )

    def text(self, name: str, text: str, step: int) -> None:
        """Give a text to the trackers; ranks that do not write ignore it."""
        if self.writer:
            self.trackers.each(lambda tracker: tracker.text(name, text, step=step))

    def add(self, metrics: dict[str, Tensor], *, weight: float = 1.0) -> None:
        """Add a micro batch's finite metrics to the sums; nothing leaves the device.

        `weight` is that of its values, if steps have different numbers of micro batches.
        Of those per image [B] the log line has none; the trackers get those of its last batch.
        """
        means = {name: value for name, value in metrics.items() if value.dim() == 0}
        self.samples = {name: value for name, value in metrics.items() if name not in means}
        value_M = torch.stack(list(means.values()))
        finite_M = value_M.isfinite()
        sums_2M = torch.stack([torch.where(finite_M, value_M, 0.0), finite_M.to(value_M)])
        sums_2M = sums_2M if weight == 1 else weight * sums_2M
        self.names = list(means)
        self.sums = sums_2M if self.sums is None else self.sums + sums_2M

    @contextmanager
    def bar_hidden(self) -> Iterator[None]:
        """Context manager without the progress bar: another may be shown."""
        if self.bar:
            self.bar.stop()
        try:
            yield
        finally:
            if self.bar:
                self.bar.start()

    def add_probe(self, values: Mapping[str, float], *, shown: str, seconds: float) -> None:
        """Add the values of a probe to the next line; its `seconds` do not count as training."""
        self.probed = {**values, "probe_s": seconds}
        self.shown = shown
        self.logged_time += seconds

    def write(
        self,
        step: int,
        *,
        waited_s: float,
        bad: int,
        reason_K: Tensor,
        **values: Tensor | float | None,
    ) -> tuple[LogRow, list[list[float]]]:
        """Write the line of the steps since the last one, from one host read; every rank calls it.

        `waited_s` are the seconds that this rank has waited for data so far, `bad` its unreadable
        images so far, `reason_K` is 0 for each of the steps that was taken. Tensors among `values`
        are averaged over the ranks. Returns the line, and every rank's reasons.
        """
        seconds = time.monotonic() - self.logged_time
        wait_share = (waited_s - self.logged_wait) / max(seconds, 1e-9)
        on_device = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        local = self.local_sums([*on_device.values(), wait_share, float(bad)], reason_K)
        packed = torch.cat([dist.all_gather(local).flatten(), *self.samples.values()])
        gathered, value_N = unpacked(packed.tolist(), width=len(local))  # the one host read
        names = [*self.names, *on_device, "data_wait_share"]
        sums, counts, reason_PK = reduced(gathered, len(names) + 1)
        means = {
            name: total / count if count else math.nan
            for name, total, count in zip(names, sums, counts, strict=False)
            if count or not self.sparse or name == "loss"
        }
        images_per_s = (step - self.logged_step) * self.batch_size / max(seconds, 1e-9)
        row: dict[str, Any] = {"step": step, "samples": step * self.batch_size}
        row |= {name: value for name, value in values.items() if name not in on_device}
        row |= means | {"images_per_s": images_per_s, "mem_gb": memory_gb()}
        row |= {"skipped": sum(map(bool, reason_PK[0])), "bad_images": int(sums[-1])}
        row |= throughput(images_per_s, self.flops) | self.probed
        self.sums, self.probed = None, {}
        self.logged_step, self.logged_time, self.logged_wait = step, time.monotonic(), waited_s
        self.last = cast(LogRow, row)
        if self.writer:
            self.track(row, value_N)
            self.show(row)
        return self.last, reason_PK

    def local_sums(self, once: list[Tensor | float], reason_K: Tensor) -> Tensor:
        """This rank's sums, their counts, its reasons; of each value in `once` the count is 1."""
        assert self.sums is not None
        values = [self.sums.new_tensor(v) if isinstance(v, float) else v for v in once]
        once_N = torch.cat([value.to(self.sums).reshape(1) for value in values])
        sums_2N = torch.cat([self.sums, torch.stack([once_N, torch.ones_like(once_N)])], 1)
        return torch.cat([sums_2N.flatten(), reason_K.to(sums_2N)])

    def track(self, row: Mapping[str, float | None], value_N: NDArray[np.float64]) -> None:
        """Write a line and the distributions of values per image to the trackers."""
        step = cast(int, row["step"])
        values = {name: value for name, value in row.items() if name != "step"}
        finite = self.finite_samples(value_N)

        def write(tracker: Tracker) -> None:
            for name, finite_B in finite.items():
                tracker.histogram(name, finite_B, step=step)
            tracker.scalars(values, step=step)

        self.trackers.each(write)

    def finite_samples(self, value_N: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """The finite values per image of each metric that has some."""
        ends = np.cumsum([len(sample) for sample in self.samples.values()])
        parts = zip(self.samples, np.split(value_N, ends), strict=False)
        finite = {name: value_B[np.isfinite(value_B)] for name, value_B in parts}
        return {name: value_B for name, value_B in finite.items() if len(value_B)}

    def show(self, row: dict[str, Any]) -> None:
        """Show a line."""
        loss, speed = f"loss {row['loss']:.4f}", f"{row['images_per_s']:.0f} img/s"
        if self.bar:
            loss = f"{loss}  {self.shown}" if self.shown else loss
            self.bar.update(self.task, completed=row["step"], loss=loss, speed=speed)
            return
        left = (self.steps - row["step"]) * self.batch_size / max(row["images_per_s"], 1e-9)
        waits = f"data wait {row['data_wait_share']:.0%}"
        console.say(f"step {row['step']}/{self.steps}  {loss}  {speed}  {waits}  ETA {left:.0f} s")
        if "probe_s" in row:
            console.say(f"probe in {row['probe_s']:.1f} s: {self.shown}")


def open_trackers(folder: Path, first: int, cfg: Config, report: ReportFailure | None) -> Trackers:
    """Trackers of a start whose first step is `first`; log.jsonl loses later lines."""
    file, start = folder / run_files.LOG, Start(folder=folder, cfg=cfg)
    rows = list(json_lines(file))
    kept = [row for row in rows if row is not None and step_of(row) < first]
    board = partial(TensorBoard, folder / "tb", first=first)
    lines = JsonLines(file, None if len(kept) == len(rows) and ends_line(file) else kept)
    return Trackers(lines, {"tensorboard": board} | openers(start), report=report)


def ends_line(file: Path) -> bool:
    """True if a file has a line, and its last one is whole."""
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() == b"\n"


def unpacked(values: list[float], *, width: int) -> tuple[list[list[float]], NDArray[np.float64]]:
    """A row of `width` values for each rank, and what follows them: values per image."""
    end = width * dist.world()
    return [values[at : at + width] for at in range(0, end, width)], np.array(values[end:])


def reduced(rows: list[list[float]], n: int) -> tuple[list[float], list[float], list[list[float]]]:
    """n sums and n counts over the ranks' rows, and the rest of each row."""
    columns = [sum(column) for column in zip(*(row[: 2 * n] for row in rows), strict=True)]
    return columns[:n], columns[n:], [row[2 * n :] for row in rows]


def progress_bar() -> progress.Progress:
    """rich's bar with ETA, loss and speed."""
    return progress.Progress(
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[loss]}  {task.fields[speed]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
    )


def throughput(images_per_s: float, flops_per_image: float) -> dict[str, float]:
    """TFLOP/s per device, and MFU if the device's peak is known."""
    tflops = images_per_s * flops_per_image / 1e12 / dist.world()
    row = {"tflops": tflops}
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = peak_tflops(name)
        row |= {"mfu": tflops / peak} if peak else {}
    return row


def memory_gb() -> float:
    """Peak memory of this rank in GB: of its GPU if there is one, else of its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, without lines that are not an object: a kill may leave one."""
    return [row for row in json_lines(file) if row is not None]


def step_of(row: dict[str, Any]) -> float:
    """The step of a log's line; infinite if it has none."""
    step = row.get("step")
    return step if type(step) is int and 0 < step < 2**63 else math.inf
