"""Peaks of GPUs by NVIDIA's data sheets, for the benchmark here and the planner of unic_ds."""

from __future__ import annotations

from typing import NamedTuple


class Peaks(NamedTuple):
    """Dense bf16 products and memory bandwidth."""

    tflops: float
    gb_s: float


PEAKS = {
    "a100-40": Peaks(312, 1555),
    "a100-80": Peaks(312, 2039),
    "h100-80": Peaks(989, 3350),
    "h200": Peaks(989, 4800),
    "b200": Peaks(2250, 8000),  # of DGX B200's eight: 36 PFLOP/s with sparsity, 64 TB/s
    "l40s": Peaks(362, 864),
}
"""By the planner's names; the parts of a name all stand in the one that CUDA gives the device."""


def peaks_of(device: str) -> Peaks | None:
    """Return the peaks of a device by the name that CUDA gives it; None if it is not known."""
    for name, peaks in PEAKS.items():
        if all(part in device for part in name.upper().split("-")):
            return peaks
    return None
