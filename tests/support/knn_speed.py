"""Time of a kNN beside faiss's flat index: `python tests/support/knn_speed.py [--rows N]`.

Both find the same neighbours, in one process, in turns; the figure is the median of the ratios of
wall time, or of CPU time with --cpu true (one thread, on a machine that others use as well). Exit
code 1 above LIMIT. Without faiss (`pip install faiss-cpu`) it says so, and ends with 0.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from unic_ds.evaluate.knn import BLOCK, Rows, nearest

LIMIT = 1.2


def seconds(body: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    """Time of a call by a clock, and its value."""
    began = clock()
    found = body()
    return clock() - began, found


def main() -> int:
    """Print the times; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"rows": 50_000, "width": 1024, "queries": 4096, "k": 10, "threads": 2, "repeats": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cpu", choices=("true", "false"), default="false")
    size = parser.parse_args()
    clock = time.process_time if size.cpu == "true" else time.perf_counter
    try:
        import faiss
    except ImportError:
        print("skipped: faiss is not installed (pip install faiss-cpu)")
        return 0
    torch.set_num_threads(size.threads)
    faiss.omp_set_num_threads(size.threads)
    made = torch.Generator().manual_seed(0)
    bank_NC, query_QC = (
        torch.randn(count, size.width, generator=made) for count in (size.rows, size.queries)
    )
    bank = Rows(bank_NC, torch.arange(size.rows))

    def ours() -> Any:
        with torch.inference_mode():
            return nearest(bank, query_QC, k=size.k, block=BLOCK).label_QK.numpy()

    def theirs() -> Any:
        index = faiss.IndexFlatIP(size.width)
        index.add(F.normalize(bank_NC).numpy())
        return index.search(F.normalize(query_QC).numpy(), size.k)[1]

    ratios = []
    for _ in range(size.repeats):
        (here, found), (there, same) = seconds(ours, clock), seconds(theirs, clock)
        ratios.append(here / there)
        equal = (found == same).mean()
        print(f"{here:.2f} s, faiss {there:.2f} s: {ratios[-1]:.2f}; {equal:.4%} equal neighbours")
    ratio = statistics.median(ratios)
    print(f"median {ratio:.2f} (torch {torch.__version__}, faiss {faiss.__version__})")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
