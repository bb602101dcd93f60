"""Students born in parts under ZeRO-3, for test_partitioned.py: `sharded_students.py PLAN.json`.

For each row of the plan (settings of a student, of a ladder, and what else): what each rank held at
most while the student was made, and whether its weights are bitwise those of an unpartitioned one.
"""

import gc
import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ds_settings import ds_settings

from unic_ds import config, dist
from unic_ds.config.ds_config import DeepSpeedSettings
from unic_ds.engine import deepspeed_engine
from unic_ds.models.ladder import Head
from unic_ds.models.student import Student
from unic_ds.weights import warm_start


def resident() -> int:
    """Bytes of this process's own memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@contextmanager
def peak(found: dict[str, Any]):
    """Notes how far the process grows at most while the body runs, and how long that takes."""
    gc.collect()  # of the row before
    start, since, over = resident(), time.monotonic(), threading.Event()
    tops = [0]

    def sample() -> None:
        while not over.wait(0.01):
            tops[0] = max(tops[0], resident() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    found["seconds"] = round(time.monotonic() - since, 1)
    found["peak"] = max(dist.all_gather_objects(tops[0]))
    found["kept"] = max(dist.all_gather_objects(resident() - start))


def settings(*, bf16: bool) -> DeepSpeedSettings:
    """A ds_config of ZeRO-3."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    made = ds_settings(1, zero, train_batch_size=dist.world(), bf16={"enabled": bf16})
    return DeepSpeedSettings.parse(made)


def whole_bytes(student: Student) -> int:
    """Bytes of the student where a rank has all of it."""
    return sum(deepspeed_engine.shape(p).numel() * p.element_size() for p in student.parameters())


def differing(one: Student, other: Student) -> list[str]:
    """Names of the parameters of `one`, in parts, that are not bitwise those of `other`."""
    found, there = [], dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        with deepspeed_engine.gathered(parameter):
            want = there[name].detach().to(parameter.dtype)
            if not torch.equal(parameter.detach(), want):
                found.append(name)
    here, others = dict(one.named_buffers()), dict(other.named_buffers())
    return found + [name for name in here if not torch.equal(here[name], others[name])]


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """One row's figures."""
    cfg = config.Student(**row["student"])
    ladder, heads = config.Ladder(**row["ladder"]), {n: Head(w) for n, w in row["heads"].items()}
    found: dict[str, Any] = {}

    def make(gathered: Any = None) -> Student:
        more = {} if gathered is None else {"gathered": gathered}
        return Student(cfg, ladder, heads, seed=3, **more)

    def begin(student: Student) -> None:
        if path := row.get("init"):
            warm_start.start_encoder(path, student.encoder)
            assert not warm_start.start_ladder(Path(path) / warm_start.LADDER, student.ladder)

    with peak(found):
        student = deepspeed_engine.partitioned(
            lambda: make(deepspeed_engine.gathered), settings(bf16=row["bf16"])
        )
        begin(student)
    found["whole"] = whole_bytes(student)
    found["parameters"] = sum(deepspeed_engine.shape(p).numel() for p in student.parameters())
    found["partitioned"] = all(p.numel() == 0 for p in student.parameters())
    other = make()
    begin(other)
    found["differing"] = differing(student, other)
    return found


if __name__ == "__main__":
    plan = next(word for word in sys.argv[1:] if not word.startswith("--"))
    dist.start()
    rows = []
    for asked in json.loads(Path(plan).read_text()):
        rows.append(measure(asked))
        if dist.rank() == 0:
            print(asked["student"]["model"], json.dumps(rows[-1]), flush=True)
    if dist.rank() == 0:
        Path(plan).with_suffix(".measured").write_text(json.dumps(rows))
