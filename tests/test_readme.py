"""The README's words hold: its options exist, its code runs, its files are there."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from unic_ds import cli
from unic_ds.config import Teacher, job, overrides
from unic_ds.teachers.teacher import load

ROOT = Path(__file__).resolve().parent.parent
DOCS = ("data", "scaling", "reliability", "checkpoints", "teachers", "slurm", "ds_configs", "gpu")
LAUNCHERS = {
    *("account", "chdir", "cpus", "nodes", "partition", "signal", "test", "time"),
    *("nnodes", "nproc", "node", "master", "mem", "max", "cpu"),
    *("hostfile", "no_ssh", "node_rank", "master_addr", "master_port", "launcher"),
}
"""Options of sbatch, of torchrun and of deepspeed, up to a hyphen."""
NAMING_TESTS = [
    *("README.md", "CONTRIBUTING.md", "kernels/README.md", "Makefile"),
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{name}.md" for name in DOCS)])
def test_every_option_named_is_one(file):
    own = {f.name for module in cli.VERBS.values() for f in fields(module.VERB.options)}
    known = {*job.JOB_OPTIONS, *overrides.option_names(), "run", "logdir"}
    others = {"num_gpus", "json", "help", "seed", "views", "dtype", "hash"}
    if file in ("docs/slurm.md", "docs/reliability.md"):
        others |= LAUNCHERS
    others |= {"shard_mb", "max_side", "images", "rounds", "master_port", *own}
    others |= {"readers", "latency_ms", "only", "minutes", "op", "case", "check"}
    for name in re.findall(r"--([a-z_]+(?:\.[A-Za-z_]+)*)", (ROOT / file).read_text()):
        general = re.sub(r"^teachers\.\w+\.", "teachers.NAME.", name)
        assert general in known or name in others, name


def test_every_file_of_the_map_exists():
    listed = re.search(r"## The files\n```\n(.*?)```", TEXT, re.S).group(1)
    for name in re.findall(r"\b(\w+\.py)\b", listed):
        assert (ROOT / "unic_ds" / name).is_file(), name
    for folder in re.findall(r"^(?:  )?(\w+)/", listed, re.M):
        assert (ROOT / folder).is_dir() or (ROOT / "unic_ds" / folder).is_dir(), folder


@pytest.mark.parametrize("file", NAMING_TESTS)
def test_every_path_under_tests_exists(file):
    for name in re.findall(r"\btests/[\w/.*-]*\w", (ROOT / file).read_text()):
        assert any(ROOT.glob(name)), name


def test_the_command_of_your_own_run_is_understood(tmp_path):
    command = re.search(r"--recipe unic_b --data.train DIR \\\n\s+--teachers (\S+)", TEXT).group(1)
    teachers = overrides.parse_teachers(command)
    assert [t.name for t in teachers] == ["dino", "clip"]
    assert teachers[1].source == "open_clip:ViT-H-14-quickgelu/metaclip_fullcc"


def test_a_teacher_of_your_own_works(tmp_path, monkeypatch):
    (tmp_path / "my_teacher.py").write_text(re.search(r"```python\n(.*?)```", TEXT, re.S).group(1))
    monkeypatch.syspath_prepend(tmp_path)
    row = Teacher(name="mine", source="python:my_teacher:build", precision="fp32")
    teacher = load(row, grid=14, device=torch.device("cpu"))
    tokens = teacher(torch.zeros(2, 3, teacher.size, teacher.size, dtype=torch.uint8))
    assert tokens.cls_BC.shape == (2, 64)
    assert tokens.patch_BNC.shape == (2, 196, 64)


@pytest.mark.parametrize("name", ["quickstart", "unic_b", "unic_l", "unic_g"])
def test_every_recipe_of_the_table_can_be_asked_for(name):
    assert f"| `{name}` |" in TEXT
    assert job.configure(name, {}).recipe == name
