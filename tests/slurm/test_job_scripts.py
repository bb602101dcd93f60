"""The scripts of slurm/ hand on what they are given, word for word.

Slurm's two programs that a batch script calls are the smallest that do their work on one machine:
`srun` starts the command, `scontrol` knows nothing. All else is real.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
WORDS = """-n $(touch ran) `touch ran` ; touch ran & | > ran * ? ~ {a} "b" 'c' \\ %s !x #\n\t."""
"""Everything that a shell reads as more than a letter; a comma would part two sources of images."""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on a node with one rank."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    facts = {"JOB_NUM_NODES": "1", "JOB_ID": "7", "JOB_NODELIST": "n1", "NODEID": "0"}
    own = {"PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURMD_NODENAME": "127.0.0.1"}
    return os.environ | own | {f"SLURM_{name}": value for name, value in facts.items()}


def said(script: str, *words: str, code: int | None = 2, **env: str) -> str:
    """Output of a script of slurm/; it writes files below `TMPDIR` alone."""
    before = made()
    done = subprocess.run(
        ["bash", f"slurm/{script}", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    printed = done.stdout + done.stderr
    assert code in (None, done.returncode), printed
    assert made() == before, printed
    return printed


def made() -> set[Path]:
    """The run folders, and the file that WORDS would make where a shell ran them.

    Not all of the project's folder: other tests leave caches there meanwhile.
    """
    return {*(ROOT / "runs").glob("*"), *ROOT.glob("ran*")} - {ROOT / "runs" / "quickstart"}


def test_a_training_job_hands_its_options_on_word_for_word(cluster, tmp_path):
    out = tmp_path / f"-out {WORDS}"
    env = cluster | {"UNIC_DS_OUT": str(out), "UNIC_DS_DATA": WORDS}
    assert repr(WORDS) in said("unic_b_8gpu.sh", **env)
    assert repr(WORDS) in said(
        "unic_b_8gpu.sh", "--data.train", "x", f"--student.init={WORDS}", **env
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]  # what is refused leaves no folder


@pytest.mark.parametrize("recipe", ["..", "-rf", "$(touch ran)", "a/../../b"])
def test_a_training_job_makes_no_folder_after_what_is_no_recipe(cluster, recipe):
    assert "no recipe is called" in said("unic_b_8gpu.sh", f"--recipe={recipe}", **cluster)


def test_a_number_of_ranks_is_not_reckoned_before_it_is_one(cluster):
    printed = said("unic_b_8gpu.sh", **cluster | {"UNIC_DS_NPROC": "a[$(touch ran)]"})
    assert "UNIC_DS_NPROC must be a number of ranks" in printed


@pytest.mark.slow
def test_a_node_hands_its_options_on_word_for_word(cluster):
    words = ["--ds_config", "ds_configs/zero2.json", "--recipe", "unic_b", f"--data.train={WORDS}"]
    assert repr(WORDS) in said("node.sh", *words, code=None, **cluster)


@pytest.mark.parametrize(
    ("state", "used"), [("none", True), ("700", True), ("755", False), ("link", False)]
)
def test_kernels_are_cached_on_the_node_where_nobody_else_can_put_them(tmp_path, state, used):
    """With a torchrun that prints its environment; a folder that is there may be a stranger's."""
    (tmp_path / "slurm").mkdir()
    for name in ("env.sh", "node.sh"):
        shutil.copy(ROOT / "slurm" / name, tmp_path / "slurm" / name)
    (tmp_path / "torchrun").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "torchrun").chmod(0o755)
    cache = tmp_path / f"unic_ds_{os.getuid()}"
    if state == "link":
        (tmp_path / "other").mkdir(0o700)
        cache.symlink_to(tmp_path / "other")
    elif state != "none":
        cache.mkdir()
        cache.chmod(int(state, 8))
    names = {"JOB_NUM_NODES": "1", "JOB_ID": "7", "NODEID": "0", "TMPDIR": str(tmp_path)}
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURMD_NODENAME": "n1"}
    env |= {"MASTER_ADDR": "n1", "MASTER_PORT": "1", "TORCHINDUCTOR_CACHE_DIR": "mine"}
    env |= {f"SLURM_{name}": value for name, value in names.items()}
    done = subprocess.run(
        ["bash", "slurm/node.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert (f"TRITON_CACHE_DIR={cache}/triton\n" in done.stdout) == used
    assert "TORCHINDUCTOR_CACHE_DIR=mine\n" in done.stdout
    assert ("is not a folder of mode 700 of your own" in done.stderr) != used
    assert not used or cache.stat().st_mode & 0o777 == 0o700


def test_plan_and_eval_hand_their_words_on(cluster, tmp_path):
    value = "a --gpu b $(touch ran)"
    env = cluster | {"UNIC_DS_GPU": WORDS}
    words = ["--recipe", "unic_b", f"--data.train={value}", "--gpus", "8", "--ds_config"]
    assert repr(WORDS) in said("plan.sh", *words, "ds_configs/zero2.json", **env)
    run = tmp_path / f"run {WORDS}"
    assert "is no run folder" in said("eval.sh", str(run), **cluster)
    run.mkdir()
    (run / "config.yaml").write_text("[")
    assert repr(str(run / "config.yaml"))[1:-1] in said("eval.sh", str(run), **cluster)
