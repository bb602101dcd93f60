"""The first hour's command: real checks on this machine, and what becomes of one that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import first_hour
import first_hour_checks
import first_hour_parts
import first_hour_report
import pytest
import torch
from first_hour_attempt import Attempt, Found, Session, Skip
from first_hour_checks import Check
from first_hour_commands import ROOT, Clock, reason_in, stat_of

from unic_ds.planning.gpus import Efficiency

SCRIPT = str(ROOT / "tests" / "first_hour" / "first_hour.py")
GPU = torch.cuda.is_available()
HIDES = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
TESTS = """
import pytest

@pytest.mark.gpu
def test_one():
    pass

@pytest.mark.gpu
@pytest.mark.skip(reason="too small a device")
def test_two():
    pass
"""


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """State that checks share, on a machine without a GPU."""
    machine = first_hour_parts.machine() | {"gpus": [], "devices": []}
    return Session(machine=machine, out=tmp_path, clock=Clock(time.monotonic() + 60))


def command(*words: str) -> Callable[[Attempt], Found]:
    """A check that runs this Python."""
    return lambda attempt: Found(attempt.python(*words).strip())


def first_hour_run(out: Path, *words: str, **env: str) -> tuple[int, str, dict[str, dict]]:
    """(exit code, output, rows by check) of the command as a user runs it."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", str(out), *words],
        capture_output=True,
        text=True,
        env=os.environ | env,
    )
    rows = json.loads((out / "first_hour.json").read_text())["rows"]
    return done.returncode, done.stdout + done.stderr, {row["check"]: row for row in rows}


def test_the_table_of_a_few_checks(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "copy.json"
    words = ("--only", "machine,peaks,test_ladder_triton", "--json", str(file))
    code, printed, rows = first_hour_run(out, *words)
    assert code == 0, printed
    assert rows["peaks"]["result"] == "passed" and "GB/s" in rows["peaks"]["figure"]
    assert rows["test_ladder_triton"]["result"] == ("passed" if GPU else "waits for a GPU")
    assert "kernels/bench_peaks.py --json" in rows["peaks"]["commands"][0]
    assert json.loads(file.read_text()) == json.loads((out / "first_hour.json").read_text())
    machine = json.loads(file.read_text())["machine"]
    assert machine["versions"]["torch"] == torch.__version__.partition("+")[0]
    page = (out / "first_hour.md").read_text()
    for text in ("| peaks | passed |", "versions: torch", machine["commit"]):
        assert text in page
    assert "written to" in printed and not (out / "work").exists()


def test_what_is_not_installed_skips_its_checks(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDES)
    words = ("--only", "machine,training,doctor,bench-step", "--minutes", "0.08")
    code, printed, rows = first_hour_run(tmp_path / "out", *words, PYTHONPATH=str(tmp_path))
    assert code == 0, printed
    for name in ("training", "doctor"):
        assert rows[name]["result"] == "skipped", rows[name]
        assert rows[name]["reason"] == "deepspeed is not installed"
    assert rows["bench-step"]["result"] == "not run"  # five seconds are not enough
    assert "┃" not in printed and "check" in printed  # plain, without rich


def test_a_check_that_fails_does_not_stop_the_others(session: Session) -> None:
    checks = [
        Check("breaks", command("-c", "import sys; print('no luck\\x1b[2J'); sys.exit(3)"), 30),
        Check("says little", command("-c", "print('{')"), 30),
        Check("lacks a key", lambda attempt: Found(session.machine["no such fact"]), 30),
        Check("needs more", command("-c", ""), 30, needs=("no_such_module",)),
        Check("lost", command("-c", ""), 30, files=("tests/no_such_file.py",)),
        Check("works", command("-c", "print(6 * 7)"), 30),
    ]
    session.machine["missing"] = ["no_such_module"]
    rows = {row.check: row for row in first_hour.run(checks, session)}
    assert rows["breaks"].result == "failed"
    assert rows["breaks"].reason == "exit code 3: no luck\\x1b[2J"
    assert rows["breaks"].tail == ["no luck\\x1b[2J"]
    assert "KeyError" in rows["lacks a key"].reason
    assert rows["needs more"].reason == "no_such_module is not installed"
    assert rows["lost"].reason == "tests/no_such_file.py is missing"
    assert (rows["works"].result, rows["works"].figure) == ("passed", "42")
    page = first_hour_report.page(list(rows.values()), session.machine, [])
    assert "2 passed, 3 failed, 1 skipped" in page


def test_a_check_that_does_not_end_is_ended_with_all_that_it_started(session: Session) -> None:
    checks = [Check("stubborn", command("-c", STUBBORN), 2), Check("next", command("-c", ""), 30)]
    stubborn, after = first_hour.run(checks, session)
    assert (stubborn.result, stubborn.reason) == ("failed", "no end after 2 s")
    assert after.result == "passed"
    fields = stat_of(int(stubborn.tail[0]))  # its child, of a session of its own
    assert not fields or fields[0] == "Z"


def test_the_reason_is_the_error_that_an_output_names() -> None:
    said = "unic_ds: error: --out is given twice; give it once\n"
    assert reason_in(f"[INFO] start\n{said}[INFO] launch.py: killing 7\n") == said.strip()
    said = "torch.OutOfMemoryError: CUDA out of memory\n"
    assert reason_in(f"Traceback\n[rank0]: {said}[INFO] done\n") == f"[rank0]: {said.strip()}"
    assert reason_in("all is well\n\n") == "all is well"
    assert reason_in("\n") == "it printed nothing"


def test_the_time_of_all_is_kept(session: Session) -> None:
    session.clock = Clock(time.monotonic() + 6)
    sleeps = Check("sleeps", command("-c", "import time; time.sleep(600)"), 300)
    rows = first_hour.run([sleeps, sleeps], session)
    assert [(row.result, row.reason) for row in rows] == [
        ("not run", "the 10 minutes are over")
    ] * 2
    assert rows[0].seconds < 15 and rows[1].seconds == 0


def test_rows_of_pytest(session: Session, tmp_path: Path) -> None:
    def tried(name: str, text: str) -> Found:
        file = tmp_path / f"test_{name}.py"
        file.write_text(text)
        return first_hour_checks.pytest_file(Attempt(session, name, 60), file)

    assert tried("fine", TESTS).figure == "1 tests, 1 skipped (too small a device)"
    with pytest.raises(Skip, match="no_such_module is not installed"):
        tried("lacks", "import no_such_module")
    with pytest.raises(first_hour.Failed, match="test_one: assert 1 == 2"):
        tried("wrong", TESTS.replace("pass", "assert 1 == 2", 1))
    with pytest.raises(Skip, match="no test of it is marked gpu"):
        tried("none", "def test_one(): pass")


def test_every_test_that_needs_a_gpu_is_a_check() -> None:
    names = [check.name for check in first_hour_checks.all_checks()]
    assert len(set(names)) == len(names)
    found = {file.stem for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in read(file)}
    assert found - {"test_first_hour"} <= set(names)
    assert names[:4] == ["machine", "test_ladder_triton", "test_losses_triton", "test_dali_outputs"]


def test_the_page_explains_every_check() -> None:
    listed = read(ROOT / "docs" / "gpu.md").partition("## How to read it")[0]
    for check in first_hour_checks.all_checks():
        first = check.name in ("test_ladder_triton", "test_losses_triton", "test_dali_outputs")
        assert f"`{check.name}`" in listed or (check.name.startswith("test_") and not first)


def read(file: Path) -> str:
    return file.read_text()


def test_an_unknown_check_is_named() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", "peeks"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no check 'peeks'; did you mean peaks?" in done.stderr


def test_the_planner_takes_what_is_suggested(session: Session) -> None:
    assert first_hour_checks.efficiency(session) == ""
    session.shares = {"ladder": 0.41, "teachers": 0.523, "student": None, "no such": 0.5}
    text = first_hour_checks.efficiency(session)
    assert text == "ladder=0.41,teachers=0.52"
    assert Efficiency.parse(text).ladder == 0.41


@pytest.mark.slow
def test_teachers_without_weights_are_those_of_unic_l() -> None:
    meta = torch.device("meta")
    for make, width in ((first_hour_parts.dinov2_g, 1536), (first_hour_parts.metaclip_h, 1280)):
        tower = make(meta)
        cls_BC, patch_BNC = tower(torch.empty(2, 3, 336, 336, device=meta))
        assert cls_BC.shape == (2, width) and patch_BNC.shape == (2, 576, width)


@pytest.mark.lengthy
@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="the command itself is the test there")
def test_the_whole_hour_on_a_cpu(tmp_path: Path) -> None:
    """Nothing fails, what can run has a figure, and what cannot says that it waits."""
    elsewhere = {"training-all", "compile-stages"}  # test_train.py and test_blocks.py prove them
    checks = [c.name for c in first_hour_checks.all_checks() if c.name not in elsewhere]
    chosen = ("--minutes", "20", "--only", ",".join(checks))
    code, printed, rows = first_hour_run(tmp_path / "out", *chosen, OMP_NUM_THREADS="1")
    assert code == 0 and "failed" not in {row["result"] for row in rows.values()}, printed
    for name in ("bench-step", "peaks", "training", "doctor", "models", "patch-embed"):
        assert rows[name]["result"] == "passed" and rows[name]["figure"], rows[name]
    assert "planner: " in rows["training"]["expected"]
    assert rows["training"]["data"]["log"][-1]["step"] == 20
    waits = {name for name, row in rows.items() if row["result"] == "waits for a GPU"}
    assert {"test_ladder_triton", "test_dali_outputs", "test_train"} <= waits
