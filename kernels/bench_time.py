"""Times of the machine at hand: Triton's own clock on a GPU, interleaved rounds on a CPU."""

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

ROOF = {"H100": (989, 3350), "H200": (989, 4800), "A100": (312, 2039), "B200": (2250, 8000)}
"""Dense bf16 TFLOP/s and GB/s that NVIDIA's data sheets state, by a part of the device's name."""
ON_CPU = ("plain", "ours/hidden", "ours")
"""What is timed on a CPU; `hidden` is what the program does by default. On unic_b every way is."""
TARGET = 1.5
"""How much faster than plain ladder and loss shall be on a CPU, unic_b, 8 images, bf16."""


def machine(device: str) -> dict[str, str]:
    """What a time depends on."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    import triton

    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }


def processor() -> str:
    """Name of the CPU and the threads that torch uses."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit that is checked out; + where files differ from it."""
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
    """Measured rows of an op on a case, printed."""
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
    """TFLOP/s, and GB/s forward, from what was counted."""
    tflop = {"fwd": cost.forward_tflop, "bwd": cost.backward_tflop}
    found = {"tflops": (tflop[mode] if mode in tflop else sum(tflop.values())) / ms * 1e3}
    return found | ({"gb_s": cost.gigabytes / ms * 1e3} if mode == "fwd" else {})


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What times on a CPU are held against: beside plain, and beside `--kernels reference`."""
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
    """Share of the device's peak in FLOPs or bytes, whichever binds; none for unknown devices."""
    name = torch.cuda.get_device_name()
    roof = next((roof for part, roof in ROOF.items() if part in name), None)
    return roof and max(row["tflops"] / roof[0], row.get("gb_s", 0) / roof[1])


Times = dict[tuple[str, str], tuple[tuple[float, float, float], float]]


def on_cpu(made: list[Work], repeats: int) -> Times:
    """Rounds in which every implementation runs once, so that all meet the machine alike."""
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
    """20 % quantile, median, 80 % quantile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = quantiles(values, n=5, method="inclusive")
    return cuts[0], median(values), cuts[3]


def on_gpu(made: list[Work]) -> Times:
    """Triton's own clock, and the peak of memory."""
    from triton.testing import do_bench

    found: Times = {}
    for work in made:
        for mode, run in modes(work):
            torch.cuda.reset_peak_memory_stats()
            low, middle, high = do_bench(run, quantiles=[0.2, 0.5, 0.8])
            found[work.name, mode] = (low, middle, high), torch.cuda.max_memory_allocated()
    return found


def modes(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed of an implementation."""
    yield "fwd", work.forward
    if work.backward is None:
        return
    backward = work.backward
    yield "bwd", partial(work.backward, work.forward(), again=True)
    yield "both", lambda: backward(work.forward())
