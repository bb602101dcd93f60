"""What a run tells: JSON lines, TensorBoard, and a progress bar or plain lines.

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
from typing import Any, Self

import torch
from torch import Tensor

from unic_ds import dist
from unic_ds.files import encodable, write_whole
from unic_ds.files.documents import json_lines
from unic_ds.planning.gpus import peak_tflops


class RunLog:
    """A run's log on every rank; only rank 0 writes."""

    def __init__(
        self, folder: Path, *, steps: int, first: int, batch_size: int, flops_per_image: float
    ):
        """`first` is the first step to come: lines from there on, left by a killed run, are
        dropped.
        """
        self.steps, self.batch_size, self.flops = steps, batch_size, flops_per_image
        self.sums: Tensor | None = None
        self.names: list[str] = []
        self.logged_step, self.logged_time, self.logged_wait = first - 1, time.monotonic(), 0.0
        self.writer = dist.rank() == 0
        self.bar: Any = None
        if self.writer:
            self.open(folder, first)

    def open(self, folder: Path, first: int) -> None:
        """Open the files, cut back to before `first`, and the bar where there is a terminal."""
        from torch.utils.tensorboard import SummaryWriter

        file = folder / "log.jsonl"
        kept = [row for row in read(file) if step_of(row) < first]
        write_whole(file, "".join(json.dumps(row) + "\n" for row in kept))
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
        """Take a micro batch's metrics, those that are finite; nothing leaves the device."""
        value_M = torch.stack(list(metrics.values()))
        finite_M = value_M.isfinite()
        seen_2M = torch.stack([torch.where(finite_M, value_M, 0.0), finite_M.to(value_M)])
        self.names = list(metrics)
        self.sums = seen_2M if self.sums is None else self.sums + seen_2M

    def write(
        self,
        step: int,
        *,
        waited_s: float,
        bad: int,
        verdict_K: Tensor,
        **values: Tensor | float | None,
    ) -> tuple[dict[str, Any], list[list[float]]]:
        """One line for the steps since the last, from the one transfer; every rank calls it.

        `waited_s` is this rank's whole time spent waiting for data, `bad` its unreadable images so
        far, `verdict_K` is 0 for each of the steps that was taken. What is still on the device
        among `values` is averaged over the ranks. Returns the line, and every rank's verdicts.
        """
        seconds = time.monotonic() - self.logged_time
        share = (waited_s - self.logged_wait) / max(seconds, 1e-9)
        still = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        line = self.share([*still.values(), share, float(bad)], verdict_K)
        lines = dist.all_gather(line).tolist()  # the one host read
        names = [*self.names, *still, "data_wait_share"]
        sums, counts, verdict_PK = joined(lines, len(names) + 1)
        pairs = zip(names, sums, counts, strict=False)
        means = {name: total / count if count else math.nan for name, total, count in pairs}
        images_per_s = (step - self.logged_step) * self.batch_size / max(seconds, 1e-9)
        row: dict[str, Any] = {"step": step, "samples": step * self.batch_size}
        row |= {name: value for name, value in values.items() if name not in still}
        row |= means | {"images_per_s": images_per_s, "mem_gb": memory_gb()}
        row |= {"skipped": sum(map(bool, verdict_PK[0])), "bad_images": int(sums[-1])}
        row |= throughput(images_per_s, self.flops)
        self.sums = None
        self.logged_step, self.logged_time, self.logged_wait = step, time.monotonic(), waited_s
        if self.writer:
            self.publish(row)
        return row, verdict_PK

    def share(self, once: list[Tensor | float], verdict_K: Tensor) -> Tensor:
        """This rank's sums, then their counts, then its verdicts; of `once` there is one each."""
        assert self.sums is not None
        values = [self.sums.new_tensor(v) if isinstance(v, float) else v for v in once]
        once_N = torch.cat([value.to(self.sums).reshape(1) for value in values])
        share_2N = torch.cat([self.sums, torch.stack([once_N, torch.ones_like(once_N)])], 1)
        return torch.cat([share_2N.flatten(), verdict_K.to(share_2N)])

    def publish(self, row: dict[str, Any]) -> None:
        """Write a line to the file, to TensorBoard and to whoever watches."""
        self.lines.write(json.dumps({k: tidy(v) for k, v in row.items()}) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, row["step"])
        loss, speed = f"loss {row['loss']:.4f}", f"{row['images_per_s']:.0f} img/s"
        if self.bar:
            self.bar.update(self.task, completed=row["step"], loss=loss, speed=speed)
            return
        left = (self.steps - row["step"]) * self.batch_size / max(row["images_per_s"], 1e-9)
        waits = f"data wait {row['data_wait_share']:.0%}"
        print(
            f"step {row['step']}/{self.steps}  {loss}  {speed}  {waits}  ETA {left:.0f} s",
            flush=True,
        )


def joined(lines: list[list[float]], n: int) -> tuple[list[float], list[float], list[list[float]]]:
    """Of the ranks' lines: n sums and n counts over all, and what comes after them of each."""
    columns = [sum(column) for column in zip(*(line[: 2 * n] for line in lines), strict=True)]
    return columns[:n], columns[n:], [line[2 * n :] for line in lines]


def progress_bar() -> Any:
    """rich's bar with ETA, loss and speed."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[loss]}  {task.fields[speed]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
    )


def tidy(value: Any) -> Any:
    """A float at six digits; JSON has no NaN, so a value that is not finite becomes its name."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value


def throughput(images_per_s: float, flops_per_image: float) -> dict[str, float]:
    """TFLOP/s over all ranks' devices, per device, and MFU where the device's peak is known."""
    tflops = images_per_s * flops_per_image / 1e12 / dist.world()
    row = {"tflops": tflops}
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = peak_tflops(name)
        row |= {"mfu": tflops / peak} if peak else {}
    return row


def memory_gb() -> float:
    """Peak memory of this rank: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def read(file: Path) -> list[dict[str, Any]]:
    """The objects of a log's lines; a line that is none, as a kill leaves one, is left out."""
    return [row for row in json_lines(file) if row is not None]


def step_of(row: dict[str, Any]) -> float:
    """The step of a log's line; infinite where it has none."""
    step = row.get("step")
    return step if type(step) is int and 0 < step < 2**63 else math.inf
