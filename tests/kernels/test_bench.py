"""The benchmark runs for real, counts what the code does, and is silent where a check fails."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from bench_cases import CASES, batch_of, ways, weights_of
from bench_work import counts, least, shares, tiled

from unic_ds.planning import gpus
from unic_kernels.data_sheets import PEAKS, peaks_of

ROOT = Path(__file__).resolve().parents[2]

SMALL = ("--case", "unic_b", "--images", "1", "--repeats", "1")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    """The program, as a user runs it."""
    command = [sys.executable, str(ROOT / "kernels" / "bench.py"), *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_writes_what_it_measured(tmp_path: Path) -> None:
    lines, table, pictures = tmp_path / "a.jsonl", tmp_path / "a.csv", tmp_path / "pictures"
    written = ("--json", str(lines), "--csv", str(table), "--plot", str(pictures))
    done = bench("--op", "distill_loss", "--op", "moments", *SMALL, *written)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    kinds = {(row["op"], row["kind"], row["way"]) for row in rows}
    ops, drawn = ("distill_loss", "moments"), ("measured", "counted")
    assert kinds == set(product(ops, drawn, ("plain", "ours")))
    for row in rows:
        assert row["torch"] == torch.__version__ and row["commit"] and row["device"]
        if row["kind"] == "measured":
            assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"] and row["images"] == 1
            assert "peak_gb" not in row and "of_roof" not in row  # those of a GPU
    modes = {row["mode"] for row in rows if row["kind"] == "measured" and row["op"] == "moments"}
    assert modes == {"fwd"}
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    names = {file.name for file in pictures.iterdir()}
    assert names == {f"{op}_{kind}.png" for op, kind in product(ops, drawn)}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures.iterdir())


@pytest.mark.soak  # five minutes
def test_ladder_and_loss_are_timed_beside_plain() -> None:
    done = bench("--op", "step", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "x as fast as plain" in done.stdout and "measured at 1 images" in done.stdout
    assert "NOT REACHED" not in done.stdout  # counted figures; the time's own wants 8 images


@pytest.mark.parametrize("op", ["step", "ladder", "distill_loss", "moments"])
def test_a_wrong_op_gets_no_number(op: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    done = bench("--op", op, *SMALL, "--perturb", "0.02", "--json", str(file))
    assert done.returncode == 1 and not file.exists()
    assert "the check failed" in done.stderr and "ours" in done.stderr
    assert "counted" not in done.stdout and "measured" not in done.stdout


@pytest.mark.parametrize(
    "words", [("--op", "gelu"), ("--case", "unic_x"), ("--images", "0"), ("--repeats", "two")]
)
def test_wrong_input(words: tuple[str, str]) -> None:
    done = bench(*words)
    assert done.returncode == 2 and not done.stdout
    assert words[1] in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_figures_of_the_largest_ladder() -> None:
    """24 rungs, 4 teachers, both kinds of token, and the loss."""
    case = CASES["mixed_24"]
    found = counts("step", case, case.images, ("plain", "ours/hidden", "ours/all"))
    plain, hidden, everything = found.values()
    assert plain.launches > 1300 and hidden.launches <= 4 * 24 + 2 * 4 + 12
    assert hidden.kept_gigabytes <= plain.kept_gigabytes / 2
    assert everything.kept_gigabytes <= plain.kept_gigabytes / 8
    assert hidden.syncs == everything.syncs == 0
    assert hidden.backward_tflop == pytest.approx(case.kept * plain.backward_tflop)


@pytest.mark.parametrize("name", ["unic_b", "unic_l"])
def test_backward_is_q_of_the_dense_one(name: str) -> None:
    case = CASES[name]
    most = {196: 1.10, 256: 1.02}[case.patches]
    for path, done, kept in shares(case):
        assert abs(kept - case.kept) < 0.02 and kept - 1e-9 <= done <= most * kept, path


def test_tiles_are_whole() -> None:
    """One image of 196 rows cannot be skipped to the row; all of them waste next to nothing."""
    case = CASES["unic_b"]
    keep_TB = torch.zeros(4, 64, dtype=torch.bool)
    keep_TB[0, 1] = True
    assert 1.1 < tiled(case, keep_TB) / least(case, keep_TB, "none") < 1.5
    assert 1 <= tiled(case, torch.ones_like(keep_TB)) < 1.001


def test_ways_start_from_one_value() -> None:
    """Every implementation has the same predictions, and drops the pairs that the case says."""
    case = CASES["unic_b"].small(divisor=32, images=2)
    batch = batch_of(case, 2, torch.float64, "cpu")
    names = ("plain", "reference", "concatenated", "ours/none", "ours/all")
    made = ways(case, weights_of(case, torch.float64, "cpu"), names)
    first, *others = ([x for pair in way.project(batch.x) for x in pair] for way in made)
    for other in others:
        torch.testing.assert_close(other, first)
    for way in made:
        weight_TB = way.lose(way.project(batch.x), batch).weight_TB
        assert torch.equal(weight_TB > 0, batch.keep_TB)
        assert (weight_TB > 0).float().mean() == case.kept


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_peaks_by_the_name_of_a_device(device: str, name: str) -> None:
    """The planner has the same, and a device without a row has none."""
    gpu = gpus.GPUS[name]
    assert peaks_of(device) == PEAKS[name] == (gpu.tflops, gpu.memory_gb_s)
    assert peaks_of("Tesla T4") is None
