"""Times of this machine: by `triton.testing.do_bench` on a GPU, interleaved rounds on a CPU."""

from __future__ import annotations

import gc
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from bench_cases import Case
from bench_work import NAMES, Counts, Work, counts, works

from unic_kernels.data_sheets import peaks_of

ON_CPU = ("plain", "ours/hidden", "ours")
"""Implementations timed on a CPU; `hidden` is the program's default. On unic_b all are timed."""
TARGET = 1.5
"""The least speed-up of ladder and loss over plain on a CPU: unic_b, 8 images, bf16."""


def machine(device: str) -> dict[str, str]:
    """Device, versions and commit, on which a time depends."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    import triton

    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }


def processor() -> str:
    """Return the name of the CPU and the number of threads that torch uses."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the commit that is checked out, with + if files here differ from it."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(
        git("status", "--porcelain", "--", ".")
    )


def measure(
    op: str, case: Case, images: int, device: str, repeats: int | None, compile_: bool
) -> list[dict[str, Any]]:
    """Measure an op on a case, print it, return its rows."""
    every = device == "cuda" or case.name == "unic_b"
    names = [name for name in NAMES[op] if every or name in ON_CPU]
    made = list(works(op, case, images, torch.bfloat16, device, names))
    if compile_:
        plain = made[0]
        made.append(plain._replace(name="compiled", forward=torch.compile(plain.forward)))
    times = on_gpu(made) if device == "cuda" else on_cpu(made, repeats or (5 if every else 3))
    found = counts(op, case, images, NAMES[op])
    print(f"\n{op} | {case.name} | measured at {images} images, bf16, ms: median (20 % - 80 %)")
    rows = []
    for (name, mode), (values, peak) in times.items():
        low, middle, high = values
        row = {"op": op, "case": case.name, "kind": "measured", "images": images, "way": name}
        row |= {"mode": mode, "ms": middle, "ms_20": low, "ms_80": high}
        row["of_plain"] = times["plain", mode][0][1] / middle
        row |= rates(found.get(name, found["plain"]), mode, middle)
        if device == "cuda":
            row["peak_gb"] = peak / 1e9
            row["of_roof"] = of_roof(row)
        rows.append(row)
        text = f"{middle:10.2f} ({low:.2f} - {high:.2f})"
        rate = f"{row['tflops']:8.3f} TFLOP/s" if row["tflops"] else ""
        print(f"  {name:14}{mode:5}{text:34}{row['of_plain']:6.2f} x as fast as plain{rate}")
    if (op, case.name, images, device) == ("step", "unic_b", 8, "cpu"):
        rows += verdicts(rows)
    return rows


def rates(cost: Counts, mode: str, ms: float) -> dict[str, float]:
    """Return TFLOP/s, and GB/s forward, by the counts."""
    tflop = {"fwd": cost.forward_tflop, "bwd": cost.backward_tflop}
    found = {"tflops": (tflop[mode] if mode in tflop else sum(tflop.values())) / ms * 1e3}
    return found | ({"gb_s": cost.gigabytes / ms * 1e3} if mode == "fwd" else {})


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare times on a CPU with plain and with `--kernels reference`; print and return rows."""
    both = {row["way"]: row["ms"] for row in rows if row["mode"] == "both"}
    found = []
    for base in ("plain", "reference"):
        value = both[base] / both["ours/hidden"]
        text = "reached" if value >= TARGET else "NOT REACHED"
        name = f"CPU, ladder + loss, forward + backward: times as fast as {base}"
        print(f"  {name}: {value:.2f} (target >= {TARGET}) {text}")
        row = {"op": "step", "case": "unic_b", "kind": "figure", "way": name}
        found.append(row | {"value": value, "target": TARGET, "reached": value >= TARGET})
    return found


def of_roof(row: dict[str, Any]) -> float | None:
    """Return the share of the roofline: of peak FLOPs or bytes, whichever is larger; None for a
    device whose data sheet is not known.
    """
    peaks = peaks_of(torch.cuda.get_device_name())
    return peaks and max(row["tflops"] / peaks.tflops, row.get("gb_s", 0) / peaks.gb_s)


Times = dict[tuple[str, str], tuple[tuple[float, float, float], float]]


def on_cpu(made: list[Work], repeats: int) -> Times:
    """Time rounds in which every implementation runs once, so that drift of the clock hits all."""
    found: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats + 1):
        for work in made:
            gc.collect()
            start = time.perf_counter()
            given = work.forward()
            middle = time.perf_counter()
            result = work.backward(given) if work.backward else None
            end = time.perf_counter()
            del given, result
            parts = {"fwd": middle - start}
            if work.backward:
                parts |= {"bwd": end - middle, "both": end - start}
            for mode, seconds in parts.items() if turn else ():
                found.setdefault((work.name, mode), []).append(seconds * 1e3)
    return {key: (spread(values), 0.0) for key, values in found.items()}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return 20 % quantile, median, 80 % quantile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = quantiles(values, n=5, method="inclusive")
    return cuts[0], median(values), cuts[3]


def on_gpu(made: list[Work]) -> Times:
    """Time by `triton.testing.do_bench`, and read the peak of memory."""
    from triton.testing import do_bench

    found: Times = {}
    for work in made:
        for mode, run in modes(work):
            torch.cuda.reset_peak_memory_stats()
            low, middle, high = do_bench(run, quantiles=[0.2, 0.5, 0.8])
            found[work.name, mode] = (low, middle, high), torch.cuda.max_memory_allocated()
    return found


def modes(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the timed parts of an implementation: forward, backward, both."""
    yield "fwd", work.forward
    if work.backward is None:
        return
    backward = work.backward
    yield "bwd", partial(work.backward, work.forward(), again=True)
    yield "both", lambda: backward(work.forward())
