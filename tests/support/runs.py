"""Real runs of the demonstration, made as small as they can be: what starts and reads them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ds_settings import ds_settings
from forked import Forked, Ranks
from safetensors.torch import load_file

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
TRAIN = str(ROOT / "unic_ds" / "train.py")
SMALL = {
    "student.size": "32",
    "teachers.dinov2.size": "28",
    "teachers.effnet.size": "64",
    "student.drop_path": "0.1",
    "optim.warmup_epochs": "0.1",
    "eval.tasks": "knn,linear",
    "eval.max_train": "160",
    "eval.max_val": "80",
    "run.log_every": "1",
    "probe.pictures": "0",
}
TEACHERS = ("teachers.effnet.precision", "teachers.dinov2.precision")
QUICK = dict.fromkeys(("precision", *TEACHERS), "fp32") | {"optim.batch_size": "16"}
"""What runs take here that do not ask otherwise: some CPUs compute bf16 ten times slower."""
AS_SHIPPED = {key.replace(".", "__"): "bf16" for key in ("precision", *TEACHERS)}

FINISHED = {
    "optim__steps": 4,
    "run__save_every": 2,
    "probe__every": 2,
    "probe__tasks": "knn",
    "probe__images": 40,
    "probe__pictures": 4,
}
"""The run of two ranks that the fixture `finished` makes."""
PARTIAL = {"optim__steps": 6, "run__save_every": 2, "eval__on": "false"}
"""The run that the fixture `stopped` stops after four steps."""

TINY_MODELS = {
    "teachers": "narrow=python:small_teacher:narrow,wide=python:small_teacher:wide",
    "student.model": "test_vit",
    "student.size": 32,
    "student.drop_path": 0.1,
    "ladder.rungs": "2,5",
    "ladder.width": 96,
    "optim.batch_size": 8,
}
"""Teachers that cost nothing to load, and a student that learns from them in seconds."""
TINY = TINY_MODELS | {
    "ds_config": "ds_configs/zero2.json",
    "recipe": "unic_b",
    "precision": "fp32",
    "optim.warmup_epochs": 0,
    "optim.steps": 3,
    "data.threads": 1,
    "eval.k": 3,
    "eval.tasks": "knn,linear",
    "run.log_every": 1,
    "run.save_every": 2,
    "probe.pictures": 0,
}
"""A run of seconds, evaluated where there are images for it."""

LOST = {
    f"teachers__{name}__{key}": None
    for name in ("dinov2", "effnet")
    for key in ("size", "precision")
}
"""Gives a run other teachers than the demonstration's."""

DEMONSTRATION = pytest.mark.usefixtures("demonstration")
"""Marks what trains on the quickstart's teachers and images."""


def options(out, zero="zero2", **more):
    pairs = (
        {"ds_config": str(ROOT / "ds_configs" / f"{zero}.json"), "out": str(out)} | SMALL | QUICK
    )
    pairs |= {key.replace("__", "."): str(value) for key, value in more.items()}
    kept = {key: value for key, value in pairs.items() if value != "None"}
    return [word for key, value in kept.items() for word in (f"--{key}", value)]


def tiny(folder, out, more):
    """The words of a run of `TINY` settings on the images `folder`/train and `folder`/val."""
    images = {f"data.{side}": folder / side for side in ("train", "val")}
    pairs = TINY | images | {"out": folder / out} | more
    return [word for key, value in pairs.items() for word in (f"--{key}", str(value))]


def tiny_spread(folder, out, more, *, micro, stage):
    """The words of a `tiny` run with a ds_config of its own, written beside it."""
    file = folder / f"{out}.json"
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    file.write_text(json.dumps(ds_settings(micro, zero)))
    return tiny(folder, out, {"ds_config": file} | more)


def environment():
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE")
    }
    own = os.pathsep.join(filter(None, (str(SUPPORT), env.get("PYTHONPATH"))))
    path = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env | {"PATH": path, "PYTHONPATH": own, "OMP_NUM_THREADS": "1"}


def start(command):
    """A process group of its own that runs a command line, or forked ranks that run a script."""
    if isinstance(command, Forked):
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ranks_and_port(2)[-1]}
        return Ranks(command, environment() | (meet if command.ranks > 1 else {}), ROOT)
    return subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(command, code=0, timeout=900):
    process = start(command)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise
    assert process.returncode == code, output[-4000:]
    return output


def alone(out, **more):
    """One process without a launcher."""
    return Forked(1, [TRAIN, *options(out, **more)])


def two(out, **more):
    """Two ranks, where it does not matter what started them."""
    return Forked(2, [TRAIN, *options(out, **more)])


def verb(*words):
    """`unic-ds VERB ...` in one process."""
    return Forked(1, [str(ROOT / "unic_ds" / "cli" / "__main__.py"), *map(str, words)])


def together(plan, ranks=2, script="many_runs.py"):
    """One start of ranks for several runs: a script of this folder that reads them from a file."""
    return Forked(ranks, [str(SUPPORT / script), str(plan)])


def train_together(folder, name, ranks, runs):
    """Train runs, each given by its words, in one launch; `folder`/`name`.json lists them."""
    plan = folder / f"{name}.json"
    plan.write_text(json.dumps(runs))
    run(together(plan, ranks))


def launched(out, ranks=2, **more):
    """The main command."""
    return launch(TRAIN, *options(out, **more), ranks=ranks)


def launch(script, *words, ranks=2):
    """A script under the deepspeed launcher."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, *ranks_and_port(ranks), str(script), *map(str, words)]


def ranks_and_port(ranks):
    """The launcher's own options: another job may hold its usual port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--num_gpus", str(ranks), "--master_port", str(port)]


def curve(out):
    """Step -> every logged value that time does not touch."""
    timed = {"images_per_s", "data_wait_share", "mem_gb", "tflops", "mfu", "probe_s"}
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == sorted({r["step"] for r in rows})
    return {r["step"]: {k: v for k, v in r.items() if k not in timed} for r in rows}


def reached(out):
    """The last step that a run has logged, 0 before the first; a start that resumes drops some."""
    log = out / "log.jsonl"
    *rows, _unfinished = log.read_text().split("\n") if log.exists() else [""]
    return json.loads(rows[-1])["step"] if rows else 0


def saved(out):
    """The step of the newest checkpoint, 0 without one."""
    latest = out / "checkpoints" / "latest"
    return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0


def statistics(checkpoint):
    """The teachers' statistics in a checkpoint, without the guard's loss window."""
    state = load_file(checkpoint / "statistics.safetensors")
    return {name: value for name, value in state.items() if not name.startswith("guard/")}


def kill_group(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_on_the_way(command, out, last):
    """Start a run, and kill it at a random moment after its first save and before step `last`.

    Counted in steps, so that no machine is fast enough to have finished.
    """
    process, step = start(command), random.randrange(last)
    while not saved(out) or reached(out) < step:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))
    kill_group(process)
