"""Measure what this device reaches: memory bandwidth, matrix products, attention.

    python kernels/bench_peaks.py [--json]

With CUDA in bf16 at UNIC-L's shapes (336 px, 32 images), timed by `triton.testing.do_bench`; else
small ones, whose times say nothing of the machine. Shares are of the data sheet's peaks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_time import processor

from unic_kernels.data_sheets import Peaks, peaks_of

ROUNDS = 5
"""Of which the median counts on a CPU."""


def main() -> None:
    """Print a line for each measurement, or with --json one line of JSON."""
    if sys.argv[1:] not in ([], ["--json"]):
        sys.exit(__doc__)
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else processor()
    rows = list(measured("cuda" if gpu else "cpu", peaks_of(name)))
    if "--json" in sys.argv:
        print(json.dumps({"device": name, "rows": rows}))
        return
    print(name)
    for row in rows:
        share = "" if row["share"] is None else f"  {row['share']:.0%} of the data sheet"
        print(f"  {row['what']:44}{row['value']:10.2f} {row['unit']}{share}")


def measured(device: str, peaks: Peaks | None) -> Iterator[dict[str, Any]]:
    """Yield the measurements, each with its share of the data sheet's peak."""
    for kind, what, work, run in works(device):
        memory = kind == "memory"
        unit = "GB/s" if memory else "TFLOP/s"
        value = work / milliseconds(run, device) / (1e6 if memory else 1e9)
        share = value / (peaks.gb_s if memory else peaks.tflops) if peaks else None
        yield {"kind": kind, "what": what, "value": value, "unit": unit, "share": share}


def works(device: str) -> Iterator[tuple[str, str, float, Callable[[], Any]]]:
    """Yield kind, description, bytes or FLOPs, and a function that does the work once."""
    large = device == "cuda"

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    source = normal(1 << 29 if large else 1 << 22)
    copy = torch.empty_like(source)
    yield "memory", "copy", 2 * source.nbytes, lambda: copy.copy_(source)
    rows = 32 * 577 if large else 4 * 17
    hidden = normal(rows, 4096 if large else 256)
    yield "memory", "GELU of the MLP's hidden layer", 2 * hidden.nbytes, lambda: F.gelu(hidden)
    sizes = [(8192, 8192, 8192), (rows, 1024, 4096), (rows, 1536, 4096), (rows, 1280, 5120)]
    for m, k, n in sizes if large else [(256, 256, 256)]:
        a, b = normal(m, k), normal(n, k)
        yield "matmul", f"matrix product {m} x {k} x {n}", 2 * m * k * n, lambda a=a, b=b: a @ b.T
    yield from attention(normal, *((32, 16, 577) if large else (2, 2, 17)))


def attention(
    normal: Callable[..., Tensor], images: int, heads: int, tokens: int
) -> Iterator[tuple[str, str, float, Callable[[], Any]]]:
    """Yield attention of a ViT with heads of 64: forward, then forward and backward."""
    q, k, v = (normal(images, heads, tokens, 64).requires_grad_() for _ in range(3))
    flops = 4.0 * images * heads * tokens**2 * 64
    given = torch.ones_like(q)

    def forward() -> Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v)

    def both() -> Any:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), given)

    what = f"attention, {images} x {heads} heads x {tokens} tokens"
    yield "attention", f"{what}, forward", flops, forward
    yield "attention", f"{what}, both", 3.5 * flops, both


def milliseconds(run: Callable[[], Any], device: str) -> float:
    """Return the median time of a call."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, return_mode="median"))
    run()
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return median(times) * 1e3


if __name__ == "__main__":
    main()
