"""The machine that a rank runs on: if it has the GPUs that it should, and which cores are near one.

Ranks compare their machines before their first collective, which on a mix of CPUs and GPUs would
wait for ever.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unic_ds.files.printable import printable

DEEPSPEED = "CROSS_SIZE"
"""Set by the deepspeed launcher, which gives its ranks CUDA_VISIBLE_DEVICES on any machine."""
NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES by which a user, or Slurm, gives a process no GPU."""
NAMED = 4
"""Nodes that a sentence names."""


class Unfit(RuntimeError):
    """Raised on all ranks where `nodes` cannot take part; a start without them may go well."""

    def __init__(self, says: str, nodes: Sequence[str]):
        super().__init__(says)
        self.nodes = tuple(nodes)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a rank tells the others about its machine."""

    host: str
    device: str  # cuda or cpu
    gpu: str  # the model
    versions: str
    fault: str  # why it cannot train on its GPUs, or nothing


def name() -> str:
    """This node's name: Slurm's for it, or the machine's."""
    return printable(os.environ.get("SLURMD_NODENAME") or socket.gethostname())


def facts(local_rank: int, ranks: int) -> Facts:
    """Facts of this node for one of the `ranks` that run on it."""
    problem, cuda = fault(ranks), torch.cuda.is_available()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if cuda:
        versions += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    return Facts(
        host=name(),
        device="cuda" if cuda else "cpu",
        gpu=torch.cuda.get_device_name(local_rank) if cuda and not problem else "",
        versions=versions,
        fault=problem,
    )


def fault(ranks: int) -> str:
    """Why `ranks` ranks of this node cannot train on its GPUs, in a sentence; or nothing."""
    without = f"leave the node out (sbatch --exclude={name()})"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count >= ranks:
            return ""
        gpus = f"{count} GPU{'s' * (count > 1)}"
        return (
            f"node {name()} runs {ranks} ranks, but torch sees {gpus} there; start a rank for each"
            f" GPU, or look at `nvidia-smi` there and {without}"
        )
    if not (evidence := expected(os.environ)):
        return ""
    why = reason()
    if torch.version.cuda is None:
        remedy = "install a torch that is built for CUDA"
    elif "too old" in why:
        remedy = f"update the driver, or install a torch for a CUDA before {torch.version.cuda}"
    else:
        remedy = f"look at `nvidia-smi` there, or {without}"
    return (
        f"node {name()} should have GPUs ({evidence}), but torch {torch.__version__} sees none:"
        f" {why}; {remedy}, or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
    )


def expected(env: Mapping[str, str], devices: Path = Path("/dev")) -> str:
    """What says that this process should see GPUs; nothing where the user wants none."""
    visible, allocated = env.get("CUDA_VISIBLE_DEVICES"), env.get("SLURM_GPUS_ON_NODE", "0")
    if visible is not None and visible.strip() in NO_GPU:
        return ""
    if files := sorted(devices.glob("nvidia[0-9]*")):
        return f"{files[0]} is there"
    if allocated.strip() not in ("", "0"):
        return f"SLURM_GPUS_ON_NODE is {printable(allocated)}"
    if visible and DEEPSPEED not in env:
        return f"CUDA_VISIBLE_DEVICES is {printable(visible)}"
    return ""


def reason() -> str:
    """The first sentence of what torch says when it is to use a GPU and cannot."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return printable(str(error).strip().split("\n")[0].split(". ")[0]).rstrip(".")
    return "it gives no reason"


def judge(rows: Sequence[Facts]) -> tuple[str, list[str]]:
    """(why ranks with these facts cannot train together, nodes that are to blame); or nothing."""
    if faults := {row.host: row.fault for row in rows if row.fault}:
        first, *others = faults
        also = f"; the same holds for {listed(others)}" if others else ""
        return faults[first] + also, list(faults)
    devices = by(rows, "device")
    if len(devices) > 1:
        on_cpu, on_gpu = devices["cpu"], devices["cuda"]
        return (
            f"node {listed(on_cpu)} would train on the CPU, but {listed(on_gpu)} on GPUs; look at"
            f" `nvidia-smi` and CUDA_VISIBLE_DEVICES on {listed(on_cpu)}, or leave it out",
            on_cpu,
        )
    versions = by(rows, "versions")
    if len(versions) > 1:
        return (
            f"the nodes have different software: {spread(versions)}; use the same environment on"
            " all of them",
            [],
        )
    return "", []


def mixture(rows: Sequence[Facts]) -> str:
    """A sentence about ranks whose GPUs are of different models; or nothing."""
    models = by(rows, "gpu")
    if len(models) < 2:
        return ""
    return f"the GPUs differ: {spread(models)}; every step waits for the slowest"


def by(rows: Sequence[Facts], field: str) -> dict[str, list[str]]:
    """Value of a field -> the nodes that have it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        hosts = found.setdefault(getattr(row, field), [])
        if row.host not in hosts:
            hosts.append(row.host)
    return found


def spread(groups: Mapping[str, Sequence[str]]) -> str:
    """Values with the nodes that have them, in words."""
    return "; ".join(f"{printable(value)} on {listed(hosts)}" for value, hosts in groups.items())


def listed(hosts: Sequence[str]) -> str:
    """The first few names of nodes, and how many more there are."""
    more = f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else ""
    return ", ".join(map(printable, hosts[:NAMED])) + more


def cores_near(device: int, allowed: Iterable[int]) -> set[int]:
    """Those of the allowed CPU cores that are on a GPU's NUMA node; empty where nothing says so."""
    gpu: Any = torch.cuda.get_device_properties(device)
    bus = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    return cores_of(bus, Path("/sys")) & set(allowed)


def cores_of(bus: str, system: Path) -> set[int]:
    """CPU cores of the NUMA node of a PCI device, by the kernel's files under `system`."""
    with suppress(OSError, ValueError):
        number = int((system / "bus" / "pci" / "devices" / bus / "numa_node").read_text())
        if number >= 0:
            node = system / "devices" / "system" / "node" / f"node{number}"
            return parse_cores((node / "cpulist").read_text())
    return set()


def parse_cores(text: str) -> set[int]:
    """The numbers in a list of cores as the kernel writes it: 0-3,8-11."""
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return {n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)}
