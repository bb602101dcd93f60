"""Every kernel that ships compiles for every architecture, to the code that the table says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import aot as script
import pytest

from unic_kernels.builds import build
from unic_kernels.device import ARCHS
from unic_kernels.moments.kernels import MERGE_MOMENTS_TYPES, merge_moments_kernel

KERNELS = Path(script.__file__).parent


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
    golden = json.loads((KERNELS / "aot.json").read_text())
    key, row = next(iter(golden["rows"].items()))
    worse = {key: row | {"registers": row["registers"] + 8}}
    assert script.differences(golden["rows"], golden, whole=True) == []
    assert "registers was" in script.differences(worse, golden, whole=False)[0]
    assert "gone" in script.differences(worse, golden, whole=True)[-1]
    other = golden | {"versions": {"triton": "0", "ptxas": "0"}}
    assert "--write" in script.differences(golden["rows"], other, whole=True)[0]
    assert script.faults(key, row | {"spill": 3}) == ["spill 3"]
    sound = row | {"dots": 1, "mma": 1, "narrow": 1, "async": 1}
    assert script.faults(key, sound) == []
    for worse, said in (
        ({"mma": 0}, "without tensor cores"),
        ({"narrow": 2}, "2 loads of one number each"),
        ({"async": 0}, "without asynchronous copies"),
    ):
        (fault,) = script.faults(key, sound | worse)
        assert said in fault


def test_every_kernel_says_so_in_its_name():
    made = list(script.builds(script.ops(), [90]))
    assert {op for op, _, _ in made} == {"drop_coefficients", "image_losses", "ladder", "moments"}
    assert all(built.kernel.fn.__name__.endswith("_kernel") for _, _, built in made)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"i32": "rows"}, "parts"),  # without a type
        ({"i32": "rows parts stride"}, "stride"),  # no argument of the kernel
        ({"i32": "rows parts span"}, "twice"),  # of two types
    ],
)
def test_an_argument_without_one_type_is_an_error(change, name):
    given = ("merge", merge_moments_kernel, MERGE_MOMENTS_TYPES, {"BLOCK_C": 128}, {})
    assert build(*given, dtype="bf16").types["x"] == "*bf16:16"
    wrong = (*given[:2], MERGE_MOMENTS_TYPES | change, *given[3:])
    with pytest.raises(AssertionError, match=name):
        build(*wrong, dtype="bf16")
