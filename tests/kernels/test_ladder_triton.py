"""The ladder's Triton kernels: interpreted here, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from ladder_accuracy import SMALL, double, error, gradients

from unic_kernels.ladder import RECOMPUTE, ladder_projection, ladder_projection_ref
from unic_kernels.ladder.cases import Case

HERE = Path(__file__).resolve().parent


def interpreted(*words: str) -> None:
    """interpreted_ladder.py, or a part of it, in a process that interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "interpreted_ladder.py", *words],
        cwd=HERE,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_in_the_interpreter():
    interpreted("-k", "dropped or float16 and not 300")


@pytest.mark.lengthy
@pytest.mark.slow
def test_all_in_the_interpreter():
    interpreted()


LARGE = Case(
    name="as trained",
    images=32,
    tokens=256,
    width=1024,
    layout=((1024,) * 4,) * 3 + ((4096,) * 4,),
    out=(768, 1024, 1280, 1536),
)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*SMALL, LARGE], ids=str)
def test_near_the_truth_on_the_device(case, dtype, recompute):
    inputs = case.inputs(dtype, "cuda")
    truth = gradients(ladder_projection_ref, double(inputs))
    eager = error(gradients(ladder_projection_ref, inputs), truth)
    ours = error(gradients(ladder_projection, inputs, recompute=recompute), truth)
    assert [a <= 2 * b + 1e-6 for a, b in zip(ours, eager, strict=True)] == [True] * len(ours)


@pytest.mark.gpu
def test_a_hundred_runs_are_bitwise_equal():
    inputs = LARGE.inputs(torch.bfloat16, "cuda")
    first = gradients(ladder_projection, inputs, recompute="all")
    for _ in range(100):
        again = gradients(ladder_projection, inputs, recompute="all")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.gpu
def test_the_host_never_waits():
    inputs = LARGE.inputs(torch.bfloat16, "cuda")
    gradients(ladder_projection, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(ladder_projection, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_not_slower_than_eager():
    from triton.testing import do_bench

    inputs = LARGE.inputs(torch.bfloat16, "cuda")
    ops = (ladder_projection, ladder_projection_ref)
    ours, eager = (do_bench(partial(gradients, op, inputs)) for op in ops)
    assert ours < eager
