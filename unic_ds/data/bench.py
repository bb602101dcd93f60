"""Images per second of our data loaders and of torchvision's, on the same files.

    python -m unic_ds.data.bench                     generated photographs of 500 x 375
    python -m unic_ds.data.bench --images DIR        your images: a folder, tar shards or a list
    python -m unic_ds.data.bench --json bench.json

Every loader reads, decodes and augments batches with the same number of threads (or worker
processes). Loaders take turns in rounds, so that other load on the machine affects all of them;
ratios are medians over rounds. With a GPU, DALI is also measured decoding on it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import tracemalloc
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from unic_ds import dist
from unic_ds.config import Data
from unic_ds.data import Source, order, pack, scan
from unic_ds.data.augmentation import draw
from unic_ds.data.bench_loaders import (
    Loader,
    all_loaders,
    make_photographs,
    slowed,
    stream_loader,
)
from unic_ds.data.reader import Reader
from unic_ds.data.shards import Shards
from unic_ds.data.string_table import StringTable
from unic_ds.process import console

IMAGENET = 1_281_167  # images of ImageNet-1k


class IndexCost(TypedDict):
    """Cost of the index of IMAGENET images."""

    index_mb: float
    epoch_start_s: float


class Result(IndexCost):
    """The figures, as they are written to JSON."""

    machine: str
    images: int
    size: int
    batch: int
    images_per_s: dict[str, float]
    ratios: dict[str, float]
    order_draws_reading_us: float
    order_draws_reading_share: NotRequired[float]


def main() -> None:
    """Measure, print tables, and write JSON if asked."""
    args = options().parse_args()
    threads = args.threads or dist.cores()
    with tempfile.TemporaryDirectory(prefix="unic_ds-bench-") as temporary:
        source = scan(args.images or make_photographs(Path(temporary) / "images"))
        pack.pack(source, Path(temporary) / "pack", pack.Settings(shard_mb=16), workers=threads)
        packed = scan(Path(temporary) / "pack")
        loaders = all_loaders(source, packed, args.size, args.batch, threads)
        slow = slowed(source, args.latency_ms / 1e3)
        for readers in args.readers:
            cfg = Data(threads=threads, readers=readers)
            loaders[f"readers {readers}"] = stream_loader(slow, cfg, args.size, args.batch)
        speed = measure_speed(loaders, args.batch, args.batches, args.rounds)
        read_s = measure_reading(source, args.batch)
    result: Result = {
        "machine": machine(threads),
        "images": len(source),
        "size": args.size,
        "batch": args.batch,
        "images_per_s": {name: statistics.median(rounds) for name, rounds in speed.items()},
        "ratios": ratios(speed),
        "order_draws_reading_us": read_s * 1e6,
        **measure_index(),
    }
    if speed_dali := result["images_per_s"].get("DALI on the CPU"):
        result["order_draws_reading_share"] = read_s * speed_dali
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def options() -> argparse.ArgumentParser:
    """The options of the command line."""
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m unic_ds.data.bench",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", help="as --data.train (default: generated photographs)")
    add("--size", type=int, default=224, help="side of the output in pixels (default 224)")
    add("--batch", type=int, default=32, help="images per batch (default 32)")
    add("--batches", type=int, default=16, help="batches timed per round (default 16)")
    add("--rounds", type=int, default=5, help="rounds (default 5)")
    add("--threads", type=int, default=0, help="threads or workers (default: number of cores)")
    add("--readers", type=int, nargs="+", default=[], help="also measure so many reader threads")
    add("--latency_ms", type=float, default=0, help="delay of each file for --readers (default 0)")
    add("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser


def measure_speed(
    loaders: dict[str, Loader], batch: int, batches: int, rounds: int
) -> dict[str, list[float]]:
    """Images per second of each loader in each round."""
    speed: dict[str, list[float]] = {name: [] for name in loaders}
    turns = [(turn, name) for turn in range(rounds) for name in loaders]
    running = {name: start() for name, start in loaders.items()}
    for turn, name in console.track(turns, len(turns), "rounds"):
        stream = running[name]
        for _ in islice(stream, batches if turn == 0 else batches // 2):
            pass  # warm up, and use batches that were decoded during the others' turns
        start = time.perf_counter()
        for images in islice(stream, batches):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            del images
        speed[name].append(batch * batches / (time.perf_counter() - start))
    for stream in running.values():
        stream.close()
    return speed


def ratios(speed: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds of the ratios within a round, to the faster of torchvision's loaders."""
    baselines = speed["torchvision, PIL"], speed["torchvision, tensors"]
    baseline = [max(pair) for pair in zip(*baselines, strict=True)]
    ours = {name: rounds for name, rounds in speed.items() if not name.startswith("torchvision")}
    found = {
        f"{name} / torchvision": statistics.median(
            a / b for a, b in zip(rounds, baseline, strict=True)
        )
        for name, rounds in ours.items()
    }
    for name in ("DALI on the CPU", "DALI mixed (GPU)"):
        if name in speed:
            pairs = zip(speed[f"{name}, packed"], speed[name], strict=True)
            found[f"{name}: packed / folder"] = statistics.median(a / b for a, b in pairs)
    return found


def measure_reading(source: Source, batch: int) -> float:
    """Seconds per image, on one thread, of order, augmentation parameters and reading files."""
    cfg = Data()
    reader, groups = Reader(source, cfg), source.groups(cfg.window)
    count = max(1, len(source) // batch)
    seconds = []
    for epoch in range(5):
        start = time.perf_counter()
        for k in range(count):
            index_B, pass_B = order.batch(0, groups, (epoch * count + k) * batch, batch)
            samples = [reader.read(index) for index in index_B.tolist()]
            width_B, height_B = [s.width for s in samples], [s.height for s in samples]
            draw(0, index_B, pass_B, width_B, height_B, cfg)
        seconds.append((time.perf_counter() - start) / (count * batch))
    return statistics.median(seconds)


def measure_index() -> IndexCost:
    """Memory of the index of IMAGENET images in shards, and time to start an epoch."""
    tracemalloc.start()
    names = StringTable.of(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(IMAGENET))
    shard_N = np.arange(IMAGENET, dtype=np.int32) // 5000
    tars = tuple(f"{s:06d}.tar" for s in range(shard_N[-1] + 1))
    offset_N, size_N = np.arange(IMAGENET), np.full(IMAGENET, 100_000)
    label_N = np.zeros(IMAGENET, np.int32)
    source = Shards(Path(), names, (), label_N, tars, shard_N, offset_N, size_N)
    for epoch in range(2):  # a batch between two epochs needs both orders
        order.batch(0, source.groups(8), epoch * IMAGENET, 1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    start = time.perf_counter()
    order.batch(0, source.groups(8), 2 * IMAGENET, 1)
    return {"index_mb": held / 1e6, "epoch_start_s": time.perf_counter() - start}


def machine(threads: int) -> str:
    """The machine and the versions of libraries."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {found.name: found.version for found in distributions()}
    names = ("torch", "torchvision", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "pillow")
    has = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    return f"{threads} threads, {device}, {has}"


def show(result: Result) -> None:
    """Print the figures as tables."""
    terminal = Console()
    terminal.print(result["machine"])
    title = f"{result['images']} images, {result['size']} px, batches of {result['batch']}"
    table = Table("loader", "images/s", "/ torchvision", title=title)
    for name, speed in result["images_per_s"].items():
        ratio = result["ratios"].get(f"{name} / torchvision")
        table.add_row(name, f"{speed:.0f}", f"{ratio:.2f}" if ratio else "")
    terminal.print(table)
    for name, ratio in result["ratios"].items():
        if name.endswith("packed / folder"):
            terminal.print(f"{name} {ratio:.2f}")
    share = result.get("order_draws_reading_share")
    of_time = f", {share:.1%} of the time of DALI on the CPU" if share else ""
    terminal.print(f"order, draws, reading: {result['order_draws_reading_us']:.0f} us{of_time}")
    start = f"an epoch starts in {result['epoch_start_s']:.2f} s"
    terminal.print(f"index of {IMAGENET} images: {result['index_mb']:.0f} MB, {start}")


if __name__ == "__main__":
    main()
