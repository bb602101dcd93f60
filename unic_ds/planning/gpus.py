"""GPUs by the vendors' data sheets: memory, peak FLOP/s, bandwidths; and assumed efficiencies."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from unic_ds.config import check
from unic_ds.config.option import nearest
from unic_ds.config.overrides import coerce
from unic_ds.files.documents import read_yaml
from unic_ds.files.printable import printable
from unic_kernels.data_sheets import PEAKS


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links to others; bandwidths are of one direction."""

    name: str
    memory_gb: float  # as the driver reports it, in 1e9 bytes
    tflops: float  # dense bf16
    memory_gb_s: float
    node_gb_s: float  # to the other GPUs of its node
    net_gb_s: float  # its share of the node's network
    host_gb_s: float = 32  # to the CPU, by PCIe
    per_node: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name":
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                check(
                    number and 0 < value < math.inf,
                    f"{printable(self.name)}: {field.name}",
                    "a positive number",
                    value,
                )


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Fractions of a GPU's peaks that kernels reach with large micro batches.

    They are assumed until measured. `teachers` and `student` are measured fractions of the peak
    over all kernels of these models, and replace `matmul`, `attention` and `memory` for them.
    """

    matmul: float = 0.657  # products: 650 of an H100's 989 TFLOP/s
    attention: float = 0.354  # forward and backward: 350 of them
    ladder: float = 0.43  # the ladder's own kernels
    memory: float = 0.776  # kernels that move bytes: 2.6 of an H100's 3.35 TB/s
    teachers: float | None = None
    student: float | None = None
    links: float = 0.75
    overlap: float = 0.80  # fraction of backward and teachers' forward that hides communication

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check(value is None or 0 < value <= 1, f"--efficiency {name}", "in (0, 1]", value)

    @classmethod
    def parse(cls, text: str) -> Efficiency:
        """Parse `student=0.4,links=0.7`; ValueError for an unknown name or no number."""
        rates: dict[str, float] = {}
        known = [field.name for field in fields(cls)]
        for word in filter(None, text.split(",")):
            name, _, value = word.partition("=")
            if name not in known:
                near = nearest(name, known)
                raise ValueError(
                    f"--efficiency has no {name!r}{near}; there are {', '.join(known)}"
                )
            rates[name] = coerce(float, value, f"--efficiency {name}")
        return cls(**rates)


def _row(  # a data sheet's numbers, in the order of the fields
    name: str, memory: float, node: float, net: float, host: float
) -> Gpu:
    return Gpu(
        name=name,
        memory_gb=memory,
        tflops=PEAKS[name].tflops,
        memory_gb_s=PEAKS[name].gb_s,
        node_gb_s=node,
        net_gb_s=net,
        host_gb_s=host,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _row("a100-40", 42.5, 300, 25, 32),
        _row("a100-80", 85.0, 300, 25, 32),
        _row("h100-80", 85.5, 450, 50, 64),
        _row("h200", 150.7, 450, 50, 64),
        _row("b200", 192.2, 900, 50, 64),
        _row("l40s", 48.3, 32, 25, 32),
    )
}
"""Networks are assumed: a 200 Gb/s adapter for each A100 and L40S, 400 Gb/s for the others."""


def get(name: str) -> Gpu:
    """A GPU by its name, a unique prefix of one, or a .yaml file with `Gpu`'s fields.

    ValueError for anything else.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return read(Path(name))
    matches = [name] if name in GPUS else [known for known in GPUS if known.startswith(name)]
    if len(matches) != 1:
        known = list(GPUS)
        raise ValueError(
            f"--gpu {name!r} is not known{nearest(name, known)}; there are {', '.join(known)}, or"
            " name a .yaml file"
        )
    return GPUS[matches[0]]


def read(file: Path) -> Gpu:
    """A GPU described in YAML."""
    try:
        plain = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"--gpu {str(file)!r} cannot be read ({error})") from None
    optional = ("name", "host_gb_s", "per_node")
    required = [field.name for field in fields(Gpu) if field.name not in optional]
    if not isinstance(plain, dict) or set(plain) - set(optional) != set(required):
        raise ValueError(
            f"--gpu {str(file)!r} must have {', '.join(required)}, and may have"
            f" {', '.join(optional[1:])}"
        )
    values: dict[str, Any] = {"name": file.stem} | plain
    return Gpu(**values)


def of_device(device: str) -> Gpu | None:
    """The GPU that CUDA gives a name, of two of a kind the smaller; None if it is not known."""
    names = sorted(GPUS, key=len, reverse=True)
    return next((GPUS[n] for n in names if n.partition("-")[0].upper() in device), None)


def peak_tflops(device: str) -> float | None:
    """Dense bf16 peak of a device by its CUDA name, in TFLOP/s; None if it is not known."""
    gpu = of_device(device)
    return gpu.tflops if gpu else None
