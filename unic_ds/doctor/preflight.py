"""Checks of this node, or under a launcher of every node, before a run."""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unic_ds import data, dist
from unic_ds.config import Config, ds_config
from unic_ds.config.data import IMAGENET
from unic_ds.doctor import all_reduce
from unic_ds.evaluate import table
from unic_ds.files import nearest_existing
from unic_ds.harness import image_sets
from unic_ds.planning import gpus, search
from unic_ds.process import node
from unic_ds.teachers import sources
from unic_ds.training import setup
from unic_kernels.moments import moments, moments_ref

OK, WARNING, FAILS = "ok", "warning", "fails"
WRITTEN_MB, SLOW_MB_S = 64, 100
SKEW_S = 5.0
SHARED_GB = 1.0
FILES = 4096
IMAGES = 64
PAIR_S = 120
"""Seconds in which two processes of a node must have started and exchanged."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Result of a check, and the remedy if it is bad."""

    check: str
    result: str
    remedy: str = ""
    state: str = OK
    host: str = ""


@dataclass(frozen=True, kw_only=True)
class IntendedRun:
    """The run that the node is checked for."""

    cfg: Config
    file: dict[str, Any]  # of the ds_config
    out: Path

    @property
    def disk(self) -> Path:
        """The innermost existing folder of `out` and its parents."""
        return nearest_existing(self.out)


def check(run: IntendedRun) -> list[CheckResult]:
    """Check this node, or together with the other ranks of a launcher every node.

    Rank 0 returns the results of all.
    """
    if dist.world() > 1:
        return check_all_ranks(run)
    return [*check_this_node(run), all_reduce_of_two()]


def check_all_ranks(run: IntendedRun) -> list[CheckResult]:
    """Check each node on its first rank, then clocks and all-reduce on all ranks."""
    try:
        dist.start()
    except node.Unfit as error:  # no rank could wait for another
        return [*check_this_node(run), failure("ranks", error)] if dist.rank() == 0 else []
    local = list(check_this_node(run)) if dist.local_rank() == 0 else []
    results = [result for part in dist.all_gather_objects(local) for result in part]
    dist.barrier()
    clocks = dist.all_gather_objects(time.time())
    spread = max(clocks) - min(clocks)
    late = "set the nodes' clocks by NTP: logs of several nodes cannot be compared"
    state = WARNING if spread > SKEW_S else OK
    text = f"{spread:.2f} s between {len(clocks)} ranks"
    results.append(result_of("clocks", text, remedy=late if state != OK else "", state=state))
    speed, backend = all_reduce.measure()
    text = f"{speed:.2f} GB/s, {backend}, {dist.world()} ranks"
    results.append(result_of("all-reduce", text))
    return results


def check_this_node(run: IntendedRun) -> Iterator[CheckResult]:
    """Yield the result of each of `CHECKS`."""
    for name, function in CHECKS.items():
        try:
            yield function(name, run)
        except (OSError, RuntimeError, ValueError) as error:
            yield failure(name, error)


def failure(name: str, error: Exception) -> CheckResult:
    """The result of a check that raised an error which would end a run."""
    result, _, remedy = str(error).partition("; ")
    return result_of(name, result, remedy=remedy, state=FAILS)


def result_of(name: str, result: str, *, remedy: str = "", state: str = OK) -> CheckResult:
    """A result from this node."""
    return CheckResult(
        check=name, result=result, remedy=remedy, state=state, host=socket.gethostname()
    )


def check_gpus(name: str, run: IntendedRun) -> CheckResult:
    """Check that torch has a GPU for each rank of the node."""
    if problem := node.fault(dist.local_world()):
        raise RuntimeError(problem)
    if not torch.cuda.is_available():
        return result_of(name, "none: a run on the CPU")
    count, first = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    return result_of(name, f"{count} x {first.name}, {first.total_memory / 1e9:.0f} GB")


def check_cpu(name: str, run: IntendedRun) -> CheckResult:
    """Count cores, and warn if bf16 would be emulated."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    fast = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    text = f"{dist.cores()} cores a rank, {'with' if fast else 'no'} bf16 instructions"
    bf16 = ds_config.DeepSpeedSettings.parse(run.file).bf16
    precision = run.cfg.precision or ("bf16" if bf16 else "fp32")
    if not fast and precision == "bf16" and not torch.cuda.is_available():
        return result_of(
            name, text, remedy="--precision fp32 is several times faster here", state=WARNING
        )
    return result_of(name, text)


def check_kernels(name: str, run: IntendedRun) -> CheckResult:
    """Compile and run a Triton kernel on the GPU, which needs a C compiler too."""
    if run.cfg.kernels == "reference" or not torch.cuda.is_available():
        return result_of(name, "none: plain torch")
    x_MC = torch.rand(256, 128).to(dist.device(), torch.bfloat16)
    try:
        agrees = torch.allclose(moments(x_MC), moments_ref(x_MC), rtol=1e-3)
    except (RuntimeError, subprocess.CalledProcessError) as error:  # no C compiler; it fails
        raise RuntimeError(
            f"{error}; Triton needs a C compiler and Python's headers (apt-get install gcc"
            " python3-dev); --kernels reference does without"
        ) from error
    if not agrees:
        raise RuntimeError("a kernel's sums are wrong; run with --kernels reference, and report it")
    return result_of(name, "Triton compiles and computes")


def check_open_files(name: str, run: IntendedRun) -> CheckResult:
    """Warn if a process may open few files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < FILES
    remedy = f"ulimit -n {FILES if hard < 0 else min(hard, 65536)} before the launcher"
    state = WARNING if few else OK
    return result_of(name, str(soft), remedy=remedy if few else "", state=state)


def check_shared_memory(name: str, run: IntendedRun) -> CheckResult:
    """Warn if /dev/shm, through which ranks of a node exchange, has little room."""
    free = shutil.disk_usage("/dev/shm").free / 1e9
    little = free < SHARED_GB
    remedy = "give the container more (--shm-size 8g, --ipc host), or empty /dev/shm"
    state = WARNING if little else OK
    return result_of(name, f"{free:.1f} GB free", remedy=remedy if little else "", state=state)


def check_disk_speed(name: str, run: IntendedRun) -> CheckResult:
    """Measure the speed of synchronised writes in the folder that the run would save to."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=run.disk) as file:
        start = time.monotonic()
        for _ in range(WRITTEN_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = WRITTEN_MB * 1.048576 / (time.monotonic() - start)
    slow = speed < SLOW_MB_S
    remedy = "put --out on a faster file system, or save less often (--run.save_minutes)"
    text = f"{speed:.0f} MB/s in {run.disk}"
    return result_of(name, text, remedy=remedy if slow else "", state=WARNING if slow else OK)


def check_disk_room(name: str, run: IntendedRun) -> CheckResult:
    """Compare free space with the size of the checkpoints that a run keeps."""
    plans = search.plan_stages(
        run.cfg,
        run.file,
        gpus.get("h100-80"),
        int(os.environ.get("WORLD_SIZE", "1")),
        images=IMAGENET,
        efficiency=gpus.Efficiency(),
    )
    needs = max(plan.checkpoint_gb for plan in plans) * (run.cfg.run.keep_last + 1)
    free = shutil.disk_usage(run.disk).free / 1e9
    text = f"{free:.1f} GB free, checkpoints take {needs:.1f} GB"
    if free < needs:
        raise OSError(f"{text}; make room, or lower --run.keep_last")
    return result_of(name, text)


def check_clock(name: str, run: IntendedRun) -> CheckResult:
    """Compare this node's clock with that of the file system."""
    with tempfile.NamedTemporaryFile(dir=run.disk) as file:
        file.write(b".")
        file.flush()
        os.fsync(file.fileno())
        skew = Path(file.name).stat().st_mtime - time.time()
    far = abs(skew) > SKEW_S
    remedy = "set this node's clock by NTP" if far else ""
    text = f"{skew:+.1f} s to the file system's"
    return result_of(name, text, remedy=remedy, state=WARNING if far else OK)


def check_images(name: str, run: IntendedRun) -> CheckResult:
    """Decode a few of the images to train on, and try a few of those to evaluate on."""
    cfg = run.cfg
    if not cfg.data.train:
        return result_of(name, "not checked", remedy="give --data.train DIR", state=WARNING)
    with redirect_stdout(sys.stderr):  # lines of a scan do not belong in a table or in JSON
        source, val = image_sets.sources_of(cfg)
    text = f"{len(source)} images, {data.backend(cfg.data)} decodes{decoding_speed(cfg, source)}"
    if not cfg.eval.on or val is None:
        return result_of(name, text)
    text += f"; {len(val)} to evaluate on"
    if not image_sets.can_evaluate(source, val):
        return result_of(name, text, remedy=f"no evaluation: {table.NEEDS}", state=WARNING)
    if problem := setup.find_unreadable(cfg, val):
        raise ValueError(problem)
    return result_of(name, text)


def decoding_speed(cfg: Config, source: data.Source) -> str:
    """` N a second`, measured on a few images; empty if they are too few."""
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
    later = sum(count for _, count in times[1:])  # start-up costs are in the first batch
    return f" {later / max(seconds, 1e-3):.0f} a second" if later else ""


def check_teachers(name: str, run: IntendedRun) -> CheckResult:
    """Check that every teacher's weights are on this node."""
    rows = run.cfg.teachers
    if not rows:
        return result_of(name, "none named", remedy="give --teachers or a --recipe", state=WARNING)
    files = [path for path in map(sources.locate, rows) if path]
    size = sum(path.stat().st_size for path in files) / 1e9
    return result_of(name, f"{', '.join(row.name for row in rows)}: {size:.2f} GB")


CHECKS: dict[str, Callable[[str, IntendedRun], CheckResult]] = {
    "GPU": check_gpus,
    "CPU": check_cpu,
    "kernels": check_kernels,
    "open files": check_open_files,
    "shared memory": check_shared_memory,
    "disk speed": check_disk_speed,
    "disk room": check_disk_room,
    "clock": check_clock,
    "images": check_images,
    "teachers": check_teachers,
}


def all_reduce_of_two() -> CheckResult:
    """Measure an all-reduce of two new processes, over NCCL if the node has two GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if torch.cuda.device_count() < 2:
        env |= {"CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", all_reduce.__name__],
            env=env | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        out, err = zip(*(process.communicate(timeout=PAIR_S) for process in started), strict=True)
    except subprocess.TimeoutExpired:
        out, err = (), (f"no end after {PAIR_S} s",)
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started) or not out:
        last = " ".join(text.strip().splitlines()[-1] for text in err if text.strip())
        remedy = "look at NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME and the firewall of the loopback"
        return result_of("all-reduce", last, remedy=remedy, state=FAILS)
    speed, backend = out[0].split()[-2:]
    return result_of("all-reduce", f"{float(speed):.2f} GB/s, {backend}, 2 processes here")
