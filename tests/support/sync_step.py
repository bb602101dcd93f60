"""Count where the host waits for the GPU within optimiser steps: `sync_step.py [--json]`.

Trains tiny students in bf16 by the trainer's own loop under the shipped ZeRO-1, 2 and 3, each also
with DeepSpeed's own waits, and prints a line for each stage: waits for the whole device, waits for
a stream or an event (host reads), their places, and the largest relative difference of a loss.
torch reports each wait to `torch.cuda._gpu_trace`, from C++ too: what the sync debug mode warns of,
and waits for the device and for events beside it. Steps with a log line are not counted, nor are
the first three, which allocate, compile, and learn the order of ZeRO-3's modules.

Exits with 1 if a step waits for the device, or a loss differs. On one GPU ZeRO-3 has nobody to
gather from, and DeepSpeed waits for a stream at each module: `torchrun --nproc-per-node 2
tests/support/sync_step.py` counts what it does on more.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pictures
import torch
from runs import ROOT, tiny
from torch.cuda import _gpu_trace

from unic_ds import dist, train
from unic_ds.config import args, job
from unic_ds.engine import deepspeed_engine, optim

STAGES, STEPS, LOGGED, COUNTED = (1, 2, 3), 8, 3, (4, 5, 7)
CLOSE = 1e-3
"""How far bf16 losses may lie apart: attention's backward may add in any order."""

LIBRARIES = ("torch/", "<frozen", "contextlib.py")


class Waits:
    """Counts waits of the host between one call of `optim.apply`, which begins a step, and others.

    Threads that read data wait for themselves; autograd's threads are none of Python's.
    """

    def __init__(self) -> None:
        self.begun, self.counts, self.places = 0, Counter[str](), Counter[str]()
        self.apply = optim.apply

    def begin(self, optimizer: Any, *given: Any) -> None:
        """Begin a step."""
        self.begun += 1
        self.apply(optimizer, *given)

    def note(self, kind: str) -> Callable[..., None]:
        """Return what torch calls at a wait of that kind."""

        def seen(*_: Any) -> None:
            ours = threading.current_thread()
            stepping = ours is threading.main_thread() or isinstance(ours, threading._DummyThread)
            if stepping and self.begun in COUNTED:
                self.counts[kind] += 1
                self.places[f"{place()}: {kind}"] += 1

        return seen


def place() -> str:
    """Return the file and function that made torch wait."""
    frame = sys._getframe(2)
    while frame.f_back and any(word in frame.f_code.co_filename for word in LIBRARIES):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_code.co_name}"


def trace(waits: Waits) -> None:
    """Let torch report waits; it cannot be told to stop."""
    torch._C._activate_gpu_trace()
    _gpu_trace.register_callback_for_device_synchronization(waits.note("device"))
    _gpu_trace.register_callback_for_stream_synchronization(waits.note("stream"))
    _gpu_trace.register_callback_for_event_synchronization(waits.note("event"))


def losses(folder: Path, out: str, stage: int, waits: Waits) -> list[float]:
    """Train a tiny student, counting; return its losses."""
    more = {
        "ds_config": ROOT / "ds_configs" / f"zero{stage}.json",
        "precision": "",
        "optim.steps": STEPS,
        "run.log_every": LOGGED,
        "run.save_every": STEPS,
        "eval.on": "false",
    }
    words = tiny(folder, out, more)
    waits.begun = 0
    waits.counts.clear()
    waits.places.clear()
    optim.apply = waits.begin
    try:
        if code := train.main(words):
            sys.exit(code)
    finally:
        optim.apply = waits.apply
    log: Path = job.resolve(args.parse(words)[1]).out / "log.jsonl"
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def measure(folder: Path, stage: int, waits: Waits) -> dict[str, Any]:
    """Return the line of a stage."""
    keep, deepspeed_engine.wait_on_device = deepspeed_engine.wait_on_device, lambda *_: None
    try:
        own = losses(folder, f"own{stage}", stage, waits)
    finally:
        deepspeed_engine.wait_on_device = keep
    before = waits.counts.total()
    ours = losses(folder, f"ours{stage}", stage, waits)
    pairs = zip(ours, own, strict=True)
    return {
        "stage": stage,
        "ranks": dist.world(),
        "steps": len(COUNTED),
        "synchronizations": waits.counts["device"],
        "host_reads": waits.counts["stream"] + waits.counts["event"],
        "places": dict(waits.places),
        "waits_of_deepspeed": before,
        "difference": max(abs(a - b) / abs(b) for a, b in pairs),
    }


def main(argv: list[str]) -> int:
    """Measure all stages on this GPU, or this rank's."""
    if not torch.cuda.is_available():
        print("no CUDA device: this script counts where the host waits for one; run it on a GPU")
        return 1
    dist.start()
    waits, good = Waits(), True
    trace(waits)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(dist.broadcast_object(own))
        if dist.rank() == 0:
            for side in ("train", "val"):
                pictures.folder(folder / side, 24)
        dist.broadcast_object(None)  # the pictures are there
        for stage in STAGES:
            found = measure(folder, stage, waits)
            good &= not found["synchronizations"] and found["difference"] <= CLOSE
            if dist.rank() == 0:
                print(json.dumps(found) if "--json" in argv else found, flush=True)
        dist.broadcast_object(None)  # nobody reads them any more
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
