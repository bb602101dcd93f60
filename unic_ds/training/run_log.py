"""The log of a run: JSON lines, TensorBoard, and a progress bar or plain lines.

Metrics stay on the device and cross to the host once per log line, averaged over its steps and all
ranks.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, cast

import torch
from rich import progress
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from unic_ds import dist
from unic_ds.files import encodable, write_atomic
from unic_ds.files.documents import json_lines
from unic_ds.planning.gpus import peak_tflops
from unic_ds.process import console


class LogRow(TypedDict, total=False):
    """A line of log.jsonl. It also has `TEACHER/METRIC` for each teacher, all floats."""

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


class RunLog:
    """A run's log on every rank; only rank 0 writes."""

    def __init__(
        self, folder: Path, *, steps: int, first: int, batch_size: int, flops_per_image: float
    ):
        """`first` is the next step; lines from there on, which a killed run left, are dropped."""
        self.steps, self.batch_size, self.flops = steps, batch_size, flops_per_image
        self.sums: Tensor | None = None
        self.names: list[str] = []
        self.last: LogRow = {}
        self.logged_step, self.logged_time, self.logged_wait = first - 1, time.monotonic(), 0.0
        self.writer = dist.rank() == 0
        self.bar: progress.Progress | None = None
        if self.writer:
            self.open(folder, first)

    def open(self, folder: Path, first: int) -> None:
        """Open the files, truncated before `first`, and a progress bar if stdout is a terminal."""
        file = folder / "log.jsonl"
        kept = [row for row in read(file) if step_of(row) < first]
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in kept))
        self.lines = file.open("a", buffering=1)
        board = folder / "tb"
        board.mkdir(exist_ok=True)
        self.board = SummaryWriter(str(encodable(board)), purge_step=first)
        if sys.stdout.isatty():
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
            self.lines.close()
            self.board.close()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add a micro batch's finite metrics to the sums; nothing leaves the device."""
        value_M = torch.stack(list(metrics.values()))
        finite_M = value_M.isfinite()
        sums_2M = torch.stack([torch.where(finite_M, value_M, 0.0), finite_M.to(value_M)])
        self.names = list(metrics)
        self.sums = sums_2M if self.sums is None else self.sums + sums_2M

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
        gathered = dist.all_gather(local).tolist()  # the one host read
        names = [*self.names, *on_device, "data_wait_share"]
        sums, counts, reason_PK = reduced(gathered, len(names) + 1)
        pairs = zip(names, sums, counts, strict=False)
        means = {name: total / count if count else math.nan for name, total, count in pairs}
        images_per_s = (step - self.logged_step) * self.batch_size / max(seconds, 1e-9)
        row: dict[str, Any] = {"step": step, "samples": step * self.batch_size}
        row |= {name: value for name, value in values.items() if name not in on_device}
        row |= means | {"images_per_s": images_per_s, "mem_gb": memory_gb()}
        row |= {"skipped": sum(map(bool, reason_PK[0])), "bad_images": int(sums[-1])}
        row |= throughput(images_per_s, self.flops)
        self.sums = None
        self.logged_step, self.logged_time, self.logged_wait = step, time.monotonic(), waited_s
        self.last = cast(LogRow, row)
        if self.writer:
            self.write_row(row)
        return self.last, reason_PK

    def local_sums(self, once: list[Tensor | float], reason_K: Tensor) -> Tensor:
        """This rank's sums, their counts, its reasons; of each value in `once` the count is 1."""
        assert self.sums is not None
        values = [self.sums.new_tensor(v) if isinstance(v, float) else v for v in once]
        once_N = torch.cat([value.to(self.sums).reshape(1) for value in values])
        sums_2N = torch.cat([self.sums, torch.stack([once_N, torch.ones_like(once_N)])], 1)
        return torch.cat([sums_2N.flatten(), reason_K.to(sums_2N)])

    def write_row(self, row: dict[str, Any]) -> None:
        """Write a line to log.jsonl and TensorBoard, and show it."""
        self.lines.write(json.dumps({k: json_value(v) for k, v in row.items()}) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, row["step"])
        loss, speed = f"loss {row['loss']:.4f}", f"{row['images_per_s']:.0f} img/s"
        if self.bar:
            self.bar.update(self.task, completed=row["step"], loss=loss, speed=speed)
            return
        left = (self.steps - row["step"]) * self.batch_size / max(row["images_per_s"], 1e-9)
        waits = f"data wait {row['data_wait_share']:.0%}"
        console.say(f"step {row['step']}/{self.steps}  {loss}  {speed}  {waits}  ETA {left:.0f} s")


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


def json_value(value: Any) -> Any:
    """A float at nine digits, or its name if it is not finite: JSON has no NaN."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value


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
