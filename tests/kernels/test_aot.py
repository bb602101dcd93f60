"""Every kernel that ships compiles for every architecture, to the code that the table says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
ARCHS = (80, 90, 100)


def aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, KERNELS / "aot.py", *arguments], capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_code_is_what_the_table_says():
    done = aot("--check")
    assert done.returncode == 0, done.stderr


def test_one_op_on_one_architecture():
    done = aot("--check", "--op", "moments", "--arch", "90")
    assert done.returncode == 0, done.stderr
    assert "sm_90" in done.stdout and "sm_80" not in done.stdout


def test_the_table_holds_what_may_ship():
    rows = json.loads((KERNELS / "aot.json").read_text())["rows"]
    assert {int(key.rpartition("_")[2]) for key in rows} == set(ARCHS)
    for key, row in rows.items():
        assert row["stack"] == row["spill"] == 0, key
        assert row["registers"] <= 255, key
        assert bool(row["mma"]) == bool(row["dots"]), key
        if row["dots"]:
            assert row["narrow"] <= 1 and row["async"] > 0, key
    assert sum(row["dots"] > 0 for row in rows.values()) > 20


def test_a_table_of_another_compiler_says_so(tmp_path):
    sys.path.insert(0, str(KERNELS))
    import aot as module

    golden = json.loads((KERNELS / "aot.json").read_text())
    key, row = next(iter(golden["rows"].items()))
    worse = {key: row | {"registers": row["registers"] + 8}}
    assert module.differences(golden["rows"], golden, whole=True) == []
    assert "registers was" in module.differences(worse, golden, whole=False)[0]
    assert "gone" in module.differences(worse, golden, whole=True)[-1]
    other = golden | {"versions": {"triton": "0", "ptxas": "0"}}
    assert "--write" in module.differences(golden["rows"], other, whole=True)[0]
    assert module.faults(key, row | {"spill": 3}) == ["spill 3"]
    sound = row | {"dots": 1, "mma": 1, "narrow": 1, "async": 1}
    assert module.faults(key, sound) == []
    for worse, said in (
        ({"mma": 0}, "without tensor cores"),
        ({"narrow": 2}, "2 loads of one number each"),
        ({"async": 0}, "without asynchronous copies"),
    ):
        (fault,) = module.faults(key, sound | worse)
        assert said in fault
