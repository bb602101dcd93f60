"""Ranks refuse nodes that lack their GPUs, before a collective could wait for ever."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from forked import Forked
from PIL import Image
from runs import ROOT, TRAIN, environment, ranks_and_port, run, tiny

from unic_ds import dist
from unic_ds.process import node

MEETS = """
import json, time
from unic_ds import dist
from unic_ds.process import node
begun = time.monotonic()
try:
    dist.start()
except node.Unfit as error:
    print(json.dumps({"says": str(error), "nodes": error.nodes, "s": time.monotonic() - begun}))
"""
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA comes up here")


@pytest.fixture(autouse=True)
def no_evidence(monkeypatch):
    """Nothing says that there are GPUs unless a test does."""
    for key in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURMD_NODENAME", node.DEEPSPEED):
        monkeypatch.delenv(key, raising=False)


def facts(host: str, **more: str) -> node.Facts:
    return replace(
        node.Facts(host=host, device="cuda", gpu="H100", versions="torch 2", fault=""), **more
    )


@pytest.mark.parametrize(
    ("env", "files", "evidence"),
    [
        ({}, [], ""),
        ({}, ["nvidiactl", "nvidia-uvm"], ""),
        ({}, ["nvidia1", "nvidia0"], "nvidia0 exists"),
        ({"SLURM_GPUS_ON_NODE": "8"}, [], "SLURM_GPUS_ON_NODE is 8"),
        ({"SLURM_GPUS_ON_NODE": "0"}, [], ""),
        ({"CUDA_VISIBLE_DEVICES": "0,\x1b"}, [], "CUDA_VISIBLE_DEVICES is 0,\\x1b"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, [], ""),  # deepspeed's, on any machine
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, ["nvidia0"], "nvidia0 exists"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}, ["nvidia0"], ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["nvidia0"], ""),
    ],
)
def test_what_says_that_there_should_be_gpus(env, files, evidence, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    found = node.gpu_evidence(env, tmp_path)
    assert found.endswith(evidence) and bool(found) == bool(evidence)


@NO_CUDA
def test_a_node_whose_cuda_does_not_come_up_is_named_with_what_torch_says(monkeypatch):
    assert node.fault(1) == ""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    what, _, remedy = node.fault(8).partition("; ")
    begins = f"node n7 should have GPUs (SLURM_GPUS_ON_NODE is 8), but torch {torch.__version__}"
    assert what.startswith(f"{begins} sees none: ") and len(what) > len(begins) + 20
    assert "CUDA_VISIBLE_DEVICES= (empty)" in remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert node.fault(8) == ""


@pytest.mark.gpu
def test_more_ranks_than_gpus_are_refused():
    count = torch.cuda.device_count()
    assert node.fault(count) == ""
    assert f"runs {count + 1} ranks, but torch sees {count} GPU" in node.fault(count + 1)


def test_ranks_that_do_not_go_together_are_told_apart():
    same = [facts("n1"), facts("n1"), facts("n2")]
    assert node.incompatibility(same) == ("", []) and node.mixed_gpus(same) == ""
    says, nodes = node.incompatibility([*same, *[facts("n3", device="cpu")] * 2])
    assert says.startswith("node n3 would train on the CPU, but n1, n2 on GPUs; ")
    assert nodes == ["n3"]
    says, nodes = node.incompatibility([*same, facts("n3", versions="torch 1")])
    assert "torch 2 on n1, n2; torch 1 on n3" in says and nodes == []
    broken = [facts(f"n{i}", fault=f"node n{i} has none; drain it") for i in range(3, 9)]
    says, nodes = node.incompatibility([*same, *broken])
    assert says.startswith("node n3 has none; ") and says.endswith("n4, n5, n6, n7 and 1 more")
    assert nodes == [f"n{i}" for i in range(3, 9)]
    mixed = [*same, facts("n3", gpu="A\n100")]
    assert node.incompatibility(mixed) == ("", [])
    assert node.mixed_gpus(mixed).startswith("the GPUs differ: H100 on n1, n2; A\\n100 on n3; ")


def start_ranks(words: list[str], *envs: dict[str, str]) -> list[subprocess.Popen]:
    """Ranks of one launch, each with an environment of its own."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ranks_and_port(2)[-1]}
    meet |= {"WORLD_SIZE": str(len(envs)), "LOCAL_WORLD_SIZE": str(len(envs))}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env=environment() | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, env in enumerate(envs)
    ]


@pytest.mark.dist
@pytest.mark.parametrize("dead", [0, pytest.param(1, marks=pytest.mark.slow)])
@NO_CUDA
def test_all_ranks_end_when_one_node_lacks_its_gpus(dead):
    envs = [{"SLURMD_NODENAME": f"n{rank}"} for rank in range(2)]
    envs[dead]["SLURM_GPUS_ON_NODE"] = "2"
    for rank in start_ranks(["-c", MEETS], *envs):
        said, why = rank.communicate(timeout=120)
        assert said, why
        row = json.loads(said)
        assert row["says"].startswith(f"node n{dead} should have GPUs ")
        assert row["nodes"] == [f"n{dead}"] and row["s"] < dist.REFUSAL_S / 3


@pytest.mark.gpu
@pytest.mark.dist
def test_a_node_on_its_cpu_among_gpus_is_refused():
    envs = [{"SLURMD_NODENAME": "n1"}, {"SLURMD_NODENAME": "n2", "CUDA_VISIBLE_DEVICES": ""}]
    for rank in start_ranks(["-c", MEETS], *(env | {"LOCAL_WORLD_SIZE": "1"} for env in envs)):
        said, why = rank.communicate(timeout=120)
        assert said, why
        row = json.loads(said)
        assert "node n2 would train on the CPU, but n1 on GPUs" in row["says"]
        assert row["nodes"] == ["n2"]


@pytest.mark.dist
@pytest.mark.slow
@NO_CUDA
def test_torchrun_does_not_try_such_a_node_again(tmp_path):
    """The run's events name the node, for the Slurm job to go on without it."""
    image = Image.new("RGB", (48, 48))
    for side in ("train", "val"):
        (tmp_path / side / "c").mkdir(parents=True)
        image.save(tmp_path / side / "c" / "0.png")
    words = tiny(tmp_path, "run", {"eval.on": "false"})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node=1", "--max-restarts=1", TRAIN, *words]
    env = environment() | {"SLURM_GPUS_ON_NODE": "2", "SLURMD_NODENAME": "n4"}
    done = subprocess.run(launcher, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "unic_ds: error: node n4 should have GPUs (SLURM_GPUS_ON_NODE is 2)" in said
    assert said.count("unic_ds: error: not tried again: node n4 should have GPUs") == 1
    (row,) = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    assert (row["event"], row["phase"], row["exclude"]) == ("failed", "meeting", "n4")
    assert row["job"] and row["error"] == row["says"]


def test_the_cores_beside_a_gpu_come_from_the_kernel(tmp_path):
    bus = "0000:1b:00.0"
    device = tmp_path / "bus" / "pci" / "devices" / bus
    cpus = tmp_path / "devices" / "system" / "node" / "node1" / "cpulist"
    assert node.cores_of(bus, tmp_path) == set()
    for folder in (device, cpus.parent):
        folder.mkdir(parents=True)
    cpus.write_text("4-6,12,14-15\n")
    (device / "numa_node").write_text("1\n")
    assert node.cores_of(bus, tmp_path) == {4, 5, 6, 12, 14, 15}
    (device / "numa_node").write_text("-1\n")
    assert node.cores_of(bus, tmp_path) == set()


@pytest.mark.gpu
def test_a_rank_stays_on_the_cores_beside_its_gpu():
    """One of eight ranks of this node, of which the others are not started."""
    code = "from unic_ds import dist; dist.use_gpu(); import os; print(*os.sched_getaffinity(0))"
    env = environment() | {"LOCAL_WORLD_SIZE": "8"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    allowed = os.sched_getaffinity(0)
    near = node.cores_near(0, allowed)
    expected = near if len(near) >= max(1, len(allowed) // 8) else allowed
    assert set(map(int, done.stdout.split())) == expected


TOGETHER = """
import torch
from torch.distributed import distributed_c10d as c10d
from unic_ds import dist
from unic_ds.engine import deepspeed_engine

def wrong():
    raise ValueError("no such thing")

def timeouts():
    cpu = torch.device("cpu")
    return [str(group._get_backend(cpu).options._timeout) for group in c10d._world.pg_map]

dist.start(7200)
says = [dist.on_rank_0(lambda: f"found by {dist.rank()}")]
try:
    dist.on_rank_0(wrong)
except ValueError as error:
    says.append(str(error))
try:
    dist.on_rank_0(lambda: {}["key"])
except (KeyError, RuntimeError) as error:
    says.append(f"{type(error).__name__} {error}")
linear = torch.nn.Linear(8, 8)
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
settings |= {"bf16": {"enabled": True}}
optimizer = torch.optim.AdamW(linear.parameters())
deepspeed_engine.load_deepspeed().initialize(
    model=linear, optimizer=optimizer, config=settings, dist_init_required=False
)
dist.shard_over_node(torch.nn.Linear(4, 4), [], offload=False)
says.append(timeouts())
dist.start(9000)  # of the run's next stage
print(*says, timeouts(), sep="; ", flush=True)
"""


@pytest.mark.dist
def test_ranks_share_what_rank_0_finds_and_one_timeout(tmp_path):
    """Of the groups that DeepSpeed and FSDP make, too."""
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    lines = [line for line in run(Forked(2, [str(script)])).splitlines() if "found by" in line]
    assert len(lines) == 2
    assert {line.split("; ")[2] for line in lines} == {
        "KeyError 'key'",
        "RuntimeError rank 0 failed: 'key'",
    }
    for line in lines:
        found, refused, _, first, then = line.split("; ")
        assert (found, refused) == ("found by 0", "no such thing")
        assert first.count("2:00:00") == then.count("2:30:00") == len(first.split(", ")) >= 2
