"""Ranks, devices and CPU cores, from the launcher's environment; without one, rank 0 of 1."""

from __future__ import annotations

import os

import torch

ALLOWED = frozenset(os.sched_getaffinity(0))
"""CPU cores that this process may use, before its affinity is set to those near its GPU."""


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes that train together (world size)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of its node, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """Number of processes on this node; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def device() -> torch.device:
    """This rank's device: its GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def cores() -> int:
    """CPU cores that this rank may keep busy: those of the process, divided by the local ranks."""
    return max(1, len(ALLOWED) // local_world())
