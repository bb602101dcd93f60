"""Node of a rank: missing GPUs, mixed devices or software, and the CPU cores near a GPU.

Ranks compare their nodes before their first collective, which would hang on a mix of CPUs and GPUs.
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
"""Variable of the deepspeed launcher, which sets CUDA_VISIBLE_DEVICES on any machine."""
NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES by which a user, or Slurm, gives a process no GPU."""
NAMED = 4
"""Most nodes that a message names."""


class Unfit(RuntimeError):
    """Raised on all ranks if `nodes` cannot take part; a start without them may succeed."""

    def __init__(self, message: str, nodes: Sequence[str]):
        super().__init__(message)
        self.nodes = tuple(nodes)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a rank's node that the ranks compare."""

    host: str
    device: str  # cuda or cpu
    gpu: str  # its model name
    versions: str
    fault: str  # reason why it cannot train on its GPUs, or empty


def name() -> str:
    """Name of this node: Slurm's if there is one, else the host name."""
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
    """Sentence if this node cannot train `ranks` ranks on its GPUs; empty if it can."""
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
    if not (evidence := gpu_evidence(os.environ)):
        return ""
    why = cuda_error()
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


def gpu_evidence(env: Mapping[str, str], devices: Path = Path("/dev")) -> str:
    """Evidence that this process should see GPUs; empty if there is none or the user wants none."""
    visible, allocated = env.get("CUDA_VISIBLE_DEVICES"), env.get("SLURM_GPUS_ON_NODE", "0")
    if visible is not None and visible.strip() in NO_GPU:
        return ""
    if files := sorted(devices.glob("nvidia[0-9]*")):
        return f"{files[0]} exists"
    if allocated.strip() not in ("", "0"):
        return f"SLURM_GPUS_ON_NODE is {printable(allocated)}"
    if visible and DEEPSPEED not in env:
        return f"CUDA_VISIBLE_DEVICES is {printable(visible)}"
    return ""


def cuda_error() -> str:
    """First sentence of torch's error when it initialises CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return printable(str(error).strip().split("\n")[0].split(". ")[0]).rstrip(".")
    return "torch gives no reason"


def incompatibility(rows: Sequence[Facts]) -> tuple[str, list[str]]:
    """(sentence on why these ranks cannot train together, nodes at fault); ("", []) if they can."""
    if faults := {row.host: row.fault for row in rows if row.fault}:
        first, *others = faults
        also = f"; the same is true of {listed(others)}" if others else ""
        return faults[first] + also, list(faults)
    devices = nodes_by(rows, "device")
    if len(devices) > 1:
        on_cpu, on_gpu = devices["cpu"], devices["cuda"]
        return (
            f"node {listed(on_cpu)} would train on the CPU, but {listed(on_gpu)} on GPUs; look at"
            f" `nvidia-smi` and CUDA_VISIBLE_DEVICES on {listed(on_cpu)}, or leave it out",
            on_cpu,
        )
    versions = nodes_by(rows, "versions")
    if len(versions) > 1:
        return (
            f"the nodes have different software: {listed_groups(versions)}; use the same"
            " environment on all of them",
            [],
        )
    return "", []


def mixed_gpus(rows: Sequence[Facts]) -> str:
    """Sentence about ranks whose GPUs are of different models; empty if all are of one."""
    models = nodes_by(rows, "gpu")
    if len(models) < 2:
        return ""
    return f"the GPUs differ: {listed_groups(models)}; every step waits for the slowest"


def nodes_by(rows: Sequence[Facts], field: str) -> dict[str, list[str]]:
    """Map from each value of a field to the nodes that have it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        hosts = found.setdefault(getattr(row, field), [])
        if row.host not in hosts:
            hosts.append(row.host)
    return found


def listed_groups(groups: Mapping[str, Sequence[str]]) -> str:
    """Values and the nodes that have each, as text."""
    return "; ".join(f"{printable(value)} on {listed(hosts)}" for value, hosts in groups.items())


def listed(hosts: Sequence[str]) -> str:
    """Names of the first few nodes, and the number of the others."""
    more = f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else ""
    return ", ".join(map(printable, hosts[:NAMED])) + more


def cores_near(device: int, allowed: Iterable[int]) -> set[int]:
    """Allowed CPU cores on a GPU's NUMA node; empty if the node is unknown."""
    gpu: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the fields
    bus = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    return cores_of(bus, Path("/sys")) & set(allowed)


def cores_of(bus: str, system: Path) -> set[int]:
    """CPU cores of a PCI device's NUMA node, from the kernel's files under `system` (/sys)."""
    with suppress(OSError, ValueError):
        number = int((system / "bus" / "pci" / "devices" / bus / "numa_node").read_text())
        if number >= 0:
            node = system / "devices" / "system" / "node" / f"node{number}"
            return parse_cores((node / "cpulist").read_text())
    return set()


def parse_cores(text: str) -> set[int]:
    """Core numbers of a list in the kernel's format: 0-3,8-11."""
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return {n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)}
