"""Parts that the first hour's checks start: facts, images, teachers without weights, model times.

python tests/first_hour/first_hour_parts.py machine           versions and devices as JSON
python tests/first_hour/first_hour_parts.py images DIR COUNT  JPEG files of photographs' size
python tests/first_hour/first_hour_parts.py models            time of teachers and student as JSON
--teachers a=python:first_hour_parts:dinov2_g          UNIC-L's teachers, weights at random
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "timm", "deepspeed", "open_clip_torch", "torchao", "pytest")
MODULES = ("torch", "triton", "numpy", "timm", "deepspeed", "open_clip", "nvidia.dali", "fire")
MODULES += ("PIL", "pytest", "rich", "yaml", "tensorboard", "safetensors")
QUERY = "driver_version,ecc.mode.current,clocks.max.sm,clocks.max.mem,power.limit"
MEAN = STD = (0.5, 0.5, 0.5)
SIZE, SMALL_SIZE = 336, 32


def machine() -> dict[str, Any]:
    """Facts that a figure depends on, and the modules that checks need and that are missing."""
    found = cuda()
    dali = [d for d in metadata.distributions() if d.name.startswith("nvidia-dali")]
    versions = {name: version_of(name) for name in PACKAGES}
    return (
        {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(),
            "python": platform.python_version(),
            "versions": versions | {"dali": dali[0].version if dali else "not installed"},
            "missing": [name for name in MODULES if not there(name)],
            "cpu": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "devices": sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*")),
            "nvidia_smi": nvidia_smi(),
        }
        | planner(found)
        | found
    )


def planner(found: dict[str, Any]) -> dict[str, Any]:
    """The planner's name of this machine's GPU, if it has one, and the efficiencies it assumes."""
    try:
        from unic_ds.planning import estimate, gpus
    except ImportError:  # of what unic_ds needs
        return {"plan_gpu": "", "efficiency": {}}
    names = [
        gpu.name
        for gpu in gpus.GPUS.values()
        for mine in found["gpus"][:1]
        if gpu.name.partition("-")[0].upper() in mine["name"]
        and abs(gpu.memory_gb / mine["memory_gb"] - 1) < 0.1
    ]
    return {"plan_gpu": names[0] if names else "", "efficiency": asdict(estimate.Efficiency())}


def version_of(package: str) -> str:
    """Version of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def there(module: str) -> bool:
    """True if a module can be found; a finder that refuses it counts as its absence."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def commit() -> str:
    """Commit that is checked out; + where files differ from it."""
    found = said("git", "rev-parse", "--short", "HEAD")
    return (found or "unknown") + "+" * bool(said("git", "status", "--porcelain"))


def nvidia_smi() -> list[dict[str, str]]:
    """Facts that the driver reports of each GPU: version, ECC, largest clocks, power limit."""
    lines = said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader").splitlines()
    names = QUERY.split(",")
    return [dict(zip(names, map(str.strip, line.split(",")), strict=False)) for line in lines]


def said(*words: str) -> str:
    """Standard output of a program; empty if it is missing or fails."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    """Name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cuda() -> dict[str, Any]:
    """GPUs as torch sees them; none where torch is missing or finds no device."""
    try:
        import torch
    except ImportError as error:
        return {"gpus": [], "cuda": "", "nccl": "", "torch_error": str(error)}
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": found.name,
                "capability": f"{found.major}.{found.minor}",
                "memory_gb": round(found.total_memory / 1e9, 1),
                "processors": found.multi_processor_count,
            }
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus else ""
    return {"gpus": gpus, "cuda": torch.version.cuda or "", "nccl": nccl}


def images(folder: Path, count: int) -> None:
    """`count` JPEG files of 500 x 375 pixels, half of them in each of two class folders."""
    from pictures import encode, photo

    for index in range(count):
        file = folder / f"class_{index % 2}" / f"{index:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(photo(500, 375, seed=index)).tobytes())


def place() -> torch.device:
    """The current GPU, or the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def described(tower: Any, size: int, patch: int) -> Any:
    """The tower with what a `python:` source says of itself."""
    tower.image_size, tower.patch_size, tower.mean, tower.std = size, patch, MEAN, STD
    return tower


def dinov2_g(device: torch.device | None = None) -> Any:
    """DINOv2-g/14 at 336 px, weights at random, made on the GPU where there is one."""
    import timm

    from unic_ds.teachers.adapters import TimmViT

    with device or place():
        model = timm.create_model("vit_giant_patch14_dinov2", img_size=SIZE, num_classes=0)
    return described(TimmViT(model, -1), SIZE, 14)


def metaclip_h(device: torch.device | None = None) -> Any:
    """MetaCLIP-H/14's tower at 336 px, weights at random, made on the GPU where there is one."""
    import open_clip

    from unic_ds.teachers.adapters import ClipViT

    options = {"force_image_size": SIZE, "device": device or place()}
    model = open_clip.create_model("ViT-H-14-quickgelu", **options)
    return described(ClipViT(model.visual, -1), SIZE, 14)


def small() -> Any:
    """A ViT of 0.4 M weights at 32 px, whose blocks are of the class of every timm ViT."""
    import timm
    import torch

    from unic_ds.teachers.adapters import TimmViT

    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=SMALL_SIZE, num_classes=0)
    return described(TimmViT(model, -1), SMALL_SIZE, 16)


def models() -> dict[str, Any]:
    """Times of the teachers' forward and of the student's forward and backward, bf16, eager.

    On a GPU of UNIC-L at 336 px and a micro batch of 32, on a CPU of a tiny ViT.
    """
    import timm
    import torch

    gpu = torch.cuda.is_available()
    size, images = (SIZE, 32) if gpu else (SMALL_SIZE, 4)
    image = torch.randn(images, 3, size, size, device=place(), dtype=torch.bfloat16)
    found = {}
    for make in (dinov2_g, metaclip_h) if gpu else (small,):
        tower = make().to(place(), torch.bfloat16).eval().requires_grad_(False)
        found[f"teacher {make.__name__}"] = timed(lambda net=tower: net(image))
        del tower
    name = "vit_large_patch14_224" if gpu else "test_vit"
    with place():
        student = timm.create_model(name, img_size=size, num_classes=0).bfloat16().train()

    def step() -> None:
        student.forward_features(image).float().square().mean().backward()
        student.zero_grad()

    found["student"] = timed(step)
    return {"device": place().type, "images": images, "size": size, "parts": found}


def timed(run: Callable[[], Any]) -> dict[str, float | None]:
    """Milliseconds of the device, those for which the host queues it, TFLOP/s, share of the peak.

    The share is None where the device's data sheet is not known.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from unic_kernels.data_sheets import peaks_of

    with FlopCounterMode(display=False) as counter:
        run()
    host = [seconds(run) for _ in range(3)][-1]
    ms, peaks = host * 1e3, None
    if torch.cuda.is_available():
        from triton.testing import do_bench

        ms = float(do_bench(run, warmup=100, rep=500, return_mode="median"))
        peaks = peaks_of(torch.cuda.get_device_name())
    tflops = counter.get_total_flops() / ms / 1e9
    share = tflops / peaks.tflops if peaks else None
    return {"ms": ms, "host_ms": host * 1e3, "tflops": tflops, "share": share}


def seconds(run: Callable[[], Any]) -> float:
    """Seconds until a call returns, on a GPU that has nothing else queued."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    """One of the commands above."""
    match sys.argv[1:]:
        case ["machine"]:
            print(json.dumps(machine()))
        case ["images", folder, count]:
            images(Path(folder), int(count))
        case ["models"]:
            print(json.dumps(models()))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
