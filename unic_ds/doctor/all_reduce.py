"""Speed of an all-reduce; as a program, over the processes of the launcher's environment."""

from __future__ import annotations

import time

import torch

from unic_ds import dist

MB = 32


def measure() -> tuple[float, str]:
    """GB/s of an all-reduce over all ranks, and its backend; RuntimeError if its sum is wrong."""
    device = dist.device()
    ones = torch.ones(MB << 18, device=device)
    dist.all_reduce_sum(ones)  # connects
    start = time.monotonic()
    smallest = float(dist.all_reduce_sum(ones).min())
    seconds = time.monotonic() - start
    if smallest != dist.world():
        raise RuntimeError(f"an all-reduce of {dist.world()} ranks gave {smallest}")
    return 4 * ones.numel() / seconds / 1e9, "NCCL" if device.type == "cuda" else "gloo"


if __name__ == "__main__":
    dist.start(60)
    print(*measure())
