"""`unic-ds doctor`: whether this node, or under a launcher every node, could run what is asked."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unic_ds.config import Config, ds_config
from unic_ds.config.data import IMAGENET
from unic_ds.planning import gpus, search

OK, WARNING, FAILS = "ok", "warning", "fails"
VERB_OPTIONS = ("ds_config", "out", "json")
WRITTEN_MB, SLOW_MB_S = 64, 100
SKEW_S = 5.0
SHARED_GB = 1.0
FILES = 4096
IMAGES = 64
REDUCED_MB = 32
ALONE_S = 120  # for two processes to start and exchange


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a check found, and what to do about it."""

    check: str
    result: str
    remedy: str = ""
    state: str = OK
    host: str = ""


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What a node is to run."""

    cfg: Config
    file: dict[str, Any]  # of the ds_config
    out: Path

    @property
    def disk(self) -> Path:
        """The folder that is there of those that `out` lies in."""
        folders = (self.out.absolute(), *self.out.absolute().parents)
        return next(folder for folder in folders if folder.is_dir())


def run(own: dict[str, str], cfg: Config) -> int:
    """The verb: print what the checks found; exit code 1 where a run would fail."""
    file = ds_config.read(own.get("ds_config", "ds_configs/zero2.json"))
    patient = Patient(cfg=cfg, file=file, out=Path(own.get("out", "runs")))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from unic_ds import dist

    rows = between_ranks(patient) if dist.world() > 1 else [*here(patient), exchange_alone()]
    if dist.rank() == 0:
        show(rows, as_json="json" in own)
    return 1 if any(row.state == FAILS for row in rows) else 0


def show(rows: list[Row], *, as_json: bool) -> None:
    """Print the rows as a table for people or one JSON object for programs."""
    if as_json:
        fails = any(row.state == FAILS for row in rows)
        print(json.dumps({"fails": fails, "checks": [asdict(row) for row in rows]}))
        return
    from rich.console import Console
    from rich.table import Table

    several = len({row.host for row in rows}) > 1
    grid = Table(*(("node",) if several else ()), "check", "", "result", "remedy")
    for row in rows:
        node = (row.host,) if several else ()
        grid.add_row(*node, row.check, row.state, row.result, row.remedy)
    Console().print(grid)


def between_ranks(patient: Patient) -> list[Row]:
    """Every node's own checks, by its first rank, and those of all ranks together."""
    from unic_ds import dist
    from unic_ds.process import node

    try:
        dist.start()
    except node.Unfit as error:  # no rank could wait for another
        return [*here(patient), failing("ranks", error)] if dist.rank() == 0 else []
    mine = list(here(patient)) if dist.local_rank() == 0 else []
    rows = [row for part in dist.all_gather_objects(mine) for row in part]
    dist.barrier()
    clocks = dist.all_gather_objects(time.time())
    spread = max(clocks) - min(clocks)
    late = "set the nodes' clocks by NTP: logs of several nodes cannot be compared"
    state = WARNING if spread > SKEW_S else OK
    text = f"{spread:.2f} s between {len(clocks)} ranks"
    rows.append(row_of("clocks", text, remedy=late if state != OK else "", state=state))
    speed, backend = reduce()
    rows.append(row_of("all-reduce", f"{speed:.2f} GB/s, {backend}, {dist.world()} ranks"))
    return rows


def here(patient: Patient) -> Iterator[Row]:
    """The checks of this node."""
    for name, check in CHECKS.items():
        try:
            yield check(name, patient)
        except (OSError, RuntimeError, ValueError) as error:
            yield failing(name, error)


def failing(check: str, error: Exception) -> Row:
    """A row about a check that found what would end a run."""
    what, _, todo = str(error).partition("; ")
    return row_of(check, what, remedy=todo, state=FAILS)


def row_of(check: str, result: str, *, remedy: str = "", state: str = OK) -> Row:
    """A row about this node."""
    return Row(check=check, result=result, remedy=remedy, state=state, host=socket.gethostname())


def device(name: str, patient: Patient) -> Row:
    """Row about the node's GPUs, of which torch must see one for each rank."""
    import torch

    from unic_ds import dist
    from unic_ds.process import node

    if problem := node.fault(dist.local_world()):
        raise RuntimeError(problem)
    if not torch.cuda.is_available():
        return row_of(name, "none: a run on the CPU")
    count, first = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    return row_of(name, f"{count} x {first.name}, {first.total_memory / 1e9:.0f} GB")


def processor(name: str, patient: Patient) -> Row:
    """Cores, and whether bf16 is computed by instructions of its own."""
    import torch

    from unic_ds import dist

    words = set(Path("/proc/cpuinfo").read_text().split())
    fast = bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    text = f"{dist.cores()} cores a rank, {'with' if fast else 'no'} bf16 instructions"
    bf16 = ds_config.DeepSpeedSettings.parse(patient.file).bf16
    precision = patient.cfg.precision or ("bf16" if bf16 else "fp32")
    if not fast and precision == "bf16" and not torch.cuda.is_available():
        return row_of(
            name, text, remedy="--precision fp32 is several times faster here", state=WARNING
        )
    return row_of(name, text)


def kernels(name: str, patient: Patient) -> Row:
    """Whether Triton compiles and runs a kernel on the GPU, which takes a C compiler too."""
    import torch

    from unic_ds import dist
    from unic_kernels.moments import moments, moments_ref

    if patient.cfg.kernels == "reference" or not torch.cuda.is_available():
        return row_of(name, "none: plain torch")
    x_MC = torch.rand(256, 128).to(dist.device(), torch.bfloat16)
    try:
        agrees = torch.allclose(moments(x_MC), moments_ref(x_MC), rtol=1e-3)
    except (RuntimeError, subprocess.CalledProcessError) as error:  # no C compiler; it fails
        raise RuntimeError(
            f"{error}; Triton needs a C compiler and Python's headers (apt-get install gcc"
            " python3-dev); --kernels reference does without"
        ) from error
    if not agrees:
        raise RuntimeError("a kernel's sums are wrong; run with --kernels reference, and tell us")
    return row_of(name, "Triton compiles and computes")


def limits(name: str, patient: Patient) -> Row:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < FILES
    todo = f"ulimit -n {FILES if hard < 0 else min(hard, 65536)} before the launcher"
    return row_of(name, str(soft), remedy=todo if few else "", state=WARNING if few else OK)


def shared_memory(name: str, patient: Patient) -> Row:
    """Room in /dev/shm, over which ranks of a node exchange."""
    free = shutil.disk_usage("/dev/shm").free / 1e9
    little = free < SHARED_GB
    todo = "give the container more (--shm-size 8g, --ipc host), or empty /dev/shm"
    text = f"{free:.1f} GB free"
    return row_of(name, text, remedy=todo if little else "", state=WARNING if little else OK)


def disk_speed(name: str, patient: Patient) -> Row:
    """Write speed where the run would save, down to the disk."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=patient.disk) as file:
        begun = time.monotonic()
        for _ in range(WRITTEN_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = WRITTEN_MB * 1.048576 / (time.monotonic() - begun)
    slow = speed < SLOW_MB_S
    todo = "put --out on a faster file system, or save more rarely (--run.save_minutes)"
    text = f"{speed:.0f} MB/s in {patient.disk}"
    return row_of(name, text, remedy=todo if slow else "", state=WARNING if slow else OK)


def disk_room(name: str, patient: Patient) -> Row:
    """Free space beside what the checkpoints take that a run keeps."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    made = search.stages(
        patient.cfg,
        patient.file,
        gpus.get("h100-80"),
        count,
        images=IMAGENET,
        efficiency=gpus.Efficiency(),
    )
    needs = max(row.checkpoint_gb for row in made) * (patient.cfg.run.keep_last + 1)
    free = shutil.disk_usage(patient.disk).free / 1e9
    text = f"{free:.1f} GB free, checkpoints take {needs:.1f} GB"
    if free < needs:
        raise OSError(f"{text}; make room, or lower --run.keep_last")
    return row_of(name, text)


def disk_clock(name: str, patient: Patient) -> Row:
    """This node's clock against that of the file system."""
    with tempfile.NamedTemporaryFile(dir=patient.disk) as file:
        file.write(b".")
        file.flush()
        os.fsync(file.fileno())
        skew = Path(file.name).stat().st_mtime - time.time()
    far = abs(skew) > SKEW_S
    todo = "set this node's clock by NTP" if far else ""
    return row_of(
        name, f"{skew:+.1f} s to the file system's", remedy=todo, state=WARNING if far else OK
    )


def images(name: str, patient: Patient) -> Row:
    """Decode a few of the run's images, of those to train on and of --data.val."""
    import numpy as np

    from unic_ds import data, dist
    from unic_ds.evaluate import table
    from unic_ds.training import setup

    cfg = patient.cfg
    if not cfg.data.train:
        return row_of(name, "not checked", remedy="give --data.train DIR", state=WARNING)
    with redirect_stdout(sys.stderr):  # what a scan says is no part of a table or of JSON
        source, val = setup.scan(cfg)
    chosen_N = np.linspace(0, len(source) - 1, min(IMAGES, len(source))).astype(np.int64)
    batches = data.passes(
        source,
        cfg.data,
        sizes=(cfg.student.size,),
        batch=len(chosen_N) // 2 or 1,
        indices=chosen_N,
        device=dist.device(),
    )
    times = [(time.monotonic(), len(batch.index_B)) for batch in batches]
    seconds = times[-1][0] - times[0][0]
    text = f"{len(source)} images, {data.backend(cfg.data)} decodes"
    if len(times) > 1:  # the first batch has what is done once
        text += f" {sum(n for _, n in times[1:]) / max(seconds, 1e-3):.0f} a second"
    if not cfg.eval.on or val is None:
        return row_of(name, text)
    text += f"; {len(val)} to evaluate on"
    if not setup.can_evaluate(source, val):
        return row_of(name, text, remedy=f"no evaluation: {table.NEEDS}", state=WARNING)
    if problem := setup.find_unreadable(cfg, val):
        raise ValueError(problem)
    return row_of(name, text)


def teachers(name: str, patient: Patient) -> Row:
    """Whether every teacher's weights are on this node."""
    from unic_ds.teachers import sources

    rows = patient.cfg.teachers
    if not rows:
        return row_of(name, "none named", remedy="give --teachers or a --recipe", state=WARNING)
    files = [path for path in map(sources.locate, rows) if path]
    size = sum(path.stat().st_size for path in files) / 1e9
    return row_of(name, f"{', '.join(row.name for row in rows)}: {size:.2f} GB")


CHECKS: dict[str, Callable[[str, Patient], Row]] = {
    "GPU": device,
    "CPU": processor,
    "kernels": kernels,
    "open files": limits,
    "shared memory": shared_memory,
    "disk speed": disk_speed,
    "disk room": disk_room,
    "clock": disk_clock,
    "images": images,
    "teachers": teachers,
}


def reduce() -> tuple[float, str]:
    """GB/s of an all-reduce over the ranks there are, and what carried it.

    RuntimeError where its sum is wrong.
    """
    import torch

    from unic_ds import dist

    place = dist.device()
    ones = torch.ones(REDUCED_MB << 18, device=place)
    dist.all_reduce_sum(ones)  # connects
    begun = time.monotonic()
    smallest = float(dist.all_reduce_sum(ones).min())
    seconds = time.monotonic() - begun
    if smallest != dist.world():
        raise RuntimeError(f"an all-reduce of {dist.world()} ranks gave {smallest}")
    return 4 * ones.numel() / seconds / 1e9, "NCCL" if place.type == "cuda" else "gloo"


def exchange_alone() -> Row:
    """An all-reduce between two processes of this node, over NCCL where it has two GPUs."""
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if torch.cuda.device_count() < 2:
        env |= {"CUDA_VISIBLE_DEVICES": ""}
    code = "from unic_ds import dist, doctor; dist.start(60); print(*doctor.reduce())"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=env | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said, why = zip(*(process.communicate(timeout=ALONE_S) for process in started), strict=True)
    except subprocess.TimeoutExpired:
        said, why = (), (f"no end after {ALONE_S} s",)
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started) or not said:
        last = " ".join(text.strip().splitlines()[-1] for text in why if text.strip())
        todo = "look at NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME and the firewall of the loopback"
        return row_of("all-reduce", last, remedy=todo, state=FAILS)
    speed, backend = said[0].split()[-2:]
    return row_of("all-reduce", f"{float(speed):.2f} GB/s, {backend}, 2 processes here")
