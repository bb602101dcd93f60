"""`unic-ds doctor RUN` on folders of real runs."""

import fcntl
import json
import shutil
import subprocess
import sys

import pytest
from runs import DEMONSTRATION

from unic_ds import autopsy, cli

pytestmark = DEMONSTRATION

BEATING = """
import os, signal, sys, time
from pathlib import Path
from unic_ds.config import Run
from unic_ds.heartbeat import Heart
with Heart(Path(sys.argv[1]), Run(hang_timeout=6), start="b", rank=0, world=1) as beat:
    beat("backward", 5)
    time.sleep(1)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("the loss is nan at step 5")
"""


@pytest.fixture
def copy(stopped, tmp_path):
    """A run that stopped after 4 of 6 steps."""
    return shutil.copytree(stopped, tmp_path / "run")


def test_a_finished_run_needs_nothing(finished, capsys):
    out, _ = finished
    assert cli.verb(["doctor", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: finished. It trained 4 steps" in printed
    assert "step_0000004: whole" in printed
    assert "What to do: nothing" in printed


def test_a_stopped_run_says_where_it_goes_on_from(copy, capsys):
    (copy / "STOP").touch()
    assert cli.verb(["doctor", str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "stopped"
    assert "after step 4 of 6" in found["says"]
    assert "goes on from step_0000004" in found["do"]
    assert any("STOP is there" in line for line in found["notes"])


def test_a_damaged_checkpoint_is_named_by_size_or_by_hash(copy):
    shard = next((copy / "checkpoints" / "step_0000004" / "zero").glob("*optim_states.pt"))
    with shard.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert not any(autopsy.examine(copy, hashes=False).checkpoints.values())
    found = autopsy.examine(copy, hashes=True)
    assert "is damaged" in found.checkpoints["step_0000004"]
    assert "goes on from step_0000002" in found.do
    with shard.open("r+b") as file:
        file.truncate(1000)
    found = autopsy.examine(copy, hashes=False)
    assert f"{shard.name} has 1000 bytes" in found.checkpoints["step_0000004"]
    assert found.good
    shutil.rmtree(copy / "checkpoints" / "step_0000002")
    assert not autopsy.examine(copy, hashes=False).good


def test_a_run_that_goes_on_is_left_alone(copy):
    with (copy / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert autopsy.examine(copy, hashes=False).state == "running"
    assert autopsy.examine(copy, hashes=False).state == "stopped"


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("killed", "was last at 'backward' of step 5 (killed from outside"),
        ("failed", "RuntimeError: the loss is nan at step 5"),
    ],
)
def test_a_run_that_ended_badly_says_how(copy, end, says):
    subprocess.run([sys.executable, "-c", BEATING, str(copy), end], capture_output=True)
    found = autopsy.examine(copy, hashes=False)
    assert (found.state, found.good) == (end, False)
    assert says in found.says
    assert "goes on from step_0000004" in found.do


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        cli.verb(["doctor", str(tmp_path)])
    with pytest.raises(ValueError, match="one run folder at most"):
        cli.verb(["doctor", "one", "two"])
    with pytest.raises(ValueError, match="unknown option --hush"):
        cli.verb(["doctor", str(tmp_path), "--hush"])
