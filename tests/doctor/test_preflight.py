"""`unic-ds doctor` on this machine: alone, under a launcher, and with something amiss."""

import json
import os
import subprocess
import sys

import pytest
import torch
from runs import DEMONSTRATION, ranks_and_port, run

from unic_ds import cli
from unic_ds.config import recipes
from unic_ds.doctor import preflight

CHECKS = {*preflight.CHECKS, "all-reduce"}


@pytest.fixture(autouse=True)
def environment_is_put_back(monkeypatch):
    """The verb takes the hub off line, for its process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def checks_of(printed: str) -> dict[str, dict]:
    """Check -> its row of a JSON answer."""
    return {row["check"]: row for row in json.loads(printed.splitlines()[-1])["checks"]}


@DEMONSTRATION
@pytest.mark.slow
def test_this_machine_could_run_the_quickstart(tmp_path, capsys):
    assert (
        cli.dispatch(["doctor", "--json", "--precision", "fp32", "--out", str(tmp_path / "r")]) == 0
    )
    rows = checks_of(capsys.readouterr().out)
    assert rows.keys() == CHECKS
    assert torch.cuda.is_available() or rows["kernels"]["result"] == "none: plain torch"
    assert "decodes" in rows["images"]["result"]
    assert "2 processes here" in rows["all-reduce"]["result"]
    assert not any(row["state"] == "fails" for row in rows.values())
    assert list(tmp_path.iterdir()) == []


@DEMONSTRATION
@pytest.mark.slow
@pytest.mark.dist
def test_what_is_missing_makes_it_fail_with_a_remedy_on_the_ranks_of_a_launcher(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", ranks_and_port(2)[-1], "-m", "unic_ds.cli", "doctor"]
    lost = f"lost=file:{tmp_path}/none.safetensors#arch=vit_tiny_patch16_224"
    images = ["--data.train", str(tmp_path / "empty"), "--data.val", "", "--data.val_share", "0.1"]
    (tmp_path / "empty").mkdir()
    printed = run([*launcher, "--json", "--teachers", lost, *images], code=1)
    line = next(line for line in printed.splitlines() if line.startswith('{"fails": true'))
    rows = checks_of(line)
    assert rows.keys() == CHECKS | {"clocks"}
    for name, text in (("teachers", "none.safetensors"), ("images", "empty")):
        assert rows[name]["state"] == "fails"
        assert text in rows[name]["result"]
        assert rows[name]["host"] == os.uname().nodename
    assert "put them there" in rows["teachers"]["remedy"]
    assert "gloo, 2 ranks" in rows["all-reduce"]["result"]


@DEMONSTRATION
@pytest.mark.slow
@pytest.mark.skipif(
    bool(subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode),
    reason="making a poor node needs root, and mount namespaces",
)
def test_a_poor_node_is_told_so(tmp_path, monkeypatch):
    """Little shared memory, little room to save, few open files, and no network."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    poor = """
    mount -t tmpfs -o size=2m none /dev/shm && mount -t tmpfs -o size=100m none "$1" &&
    ulimit -n 256 && exec "$2" -m unic_ds.cli doctor --json --out "$1"
    """
    spaces = ["unshare", "--mount", "bash", "-c", poor, "poor", str(tmp_path), sys.executable]
    rows = checks_of(run(spaces, code=1).splitlines()[-1])
    few, shared, room, network = (
        rows[name] for name in ("open files", "shared memory", "disk room", "all-reduce")
    )
    assert (few["state"], few["result"]) == ("warning", "256")
    assert few["remedy"].startswith("ulimit -n ")
    assert shared["state"] == "warning" and "--shm-size" in shared["remedy"]
    assert room["state"] == "fails" and room["result"].startswith("0.1 GB free, checkpoints take ")
    assert "--run.keep_last" in room["remedy"]
    assert network["state"] == "fails" and "GLOO_SOCKET_IFNAME" in network["remedy"]


@pytest.mark.parametrize(
    ("check", "limit", "met", "unmet", "remedy"),
    [
        ("disk speed", "SLOW_MB_S", 0.0, 1e9, "--run.save_minutes"),
        ("clock", "SKEW_S", 1e9, -1.0, "by NTP"),
    ],
)
def test_a_slow_disk_and_a_wrong_clock_are_told_so(
    tmp_path, monkeypatch, check, limit, met, unmet, remedy
):
    """Measured here, against limits that everything and nothing meets."""
    intended = preflight.IntendedRun(cfg=recipes.get("quickstart"), file={}, out=tmp_path / "run")
    monkeypatch.setattr(preflight, limit, met)
    row = preflight.CHECKS[check](check, intended)
    assert (row.state, row.remedy) == ("ok", "")
    monkeypatch.setattr(preflight, limit, unmet)
    row = preflight.CHECKS[check](check, intended)
    assert row.state == "warning" and remedy in row.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA comes up here")
def test_a_node_whose_cuda_does_not_come_up_fails(tmp_path, monkeypatch):
    intended = preflight.IntendedRun(cfg=recipes.get("quickstart"), file={}, out=tmp_path / "run")
    monkeypatch.setattr(preflight, "CHECKS", {"GPU": preflight.CHECKS["GPU"]})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("CROSS_SIZE", raising=False)
    (row,) = preflight.check_this_node(intended)
    assert (row.check, row.state) == ("GPU", "fails")
    assert "should have GPUs" in row.result and "sees none: " in row.result
    assert "CUDA_VISIBLE_DEVICES= (empty)" in row.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = preflight.check_this_node(intended)
    assert (row.state, row.result) == ("ok", "none: a run on the CPU")


@DEMONSTRATION
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA comes up here")
def test_ranks_that_cannot_meet_still_print_what_the_first_node_found(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", ranks_and_port(2)[-1], "-m", "unic_ds.cli", "doctor", "--json"]
    printed = run(launcher, code=1)
    line = next(line for line in printed.splitlines() if line.startswith('{"fails": true'))
    rows = checks_of(line)
    assert rows.keys() == {*preflight.CHECKS, "ranks"}
    assert rows["GPU"]["state"] == rows["ranks"]["state"] == "fails"
    assert rows["teachers"]["state"] == rows["disk speed"]["state"] == "ok"


@pytest.mark.gpu
def test_a_kernel_is_tried_on_the_gpu(tmp_path):
    intended = preflight.IntendedRun(cfg=recipes.get("quickstart"), file={}, out=tmp_path / "run")
    assert "Triton compiles" in preflight.check_kernels("kernels", intended).result


def test_an_unknown_option_is_refused_before_anything_is_checked():
    with pytest.raises(ValueError, match=r"unknown option --recip .*did you mean recipe"):
        cli.dispatch(["doctor", "--recip", "unic_b"])
