"""The Makefile's test commands, with the variables that `.ci/run` gives them."""

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_slow_machine_leaves_tests_out_by_marker_and_by_time():
    printed = subprocess.check_output(
        ["make", "-n", "test-slow", "LEFT_OUT=lengthy", "UNTIL=1"], cwd=ROOT, text=True
    )
    command = next(line for line in printed.splitlines() if " -m pytest " in line)
    words = shlex.split(command)
    options = words[words.index("--start-until") :]
    run = [sys.executable, "-m", "pytest", *options, "tests/test_blocks.py"]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout
    summary = ended.stdout.splitlines()[-1]
    assert "skipped" in summary and "deselected" in summary and "passed" not in summary
    assert "no time left" in ended.stdout
