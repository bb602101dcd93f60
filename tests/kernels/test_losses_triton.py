"""The Triton kernels of losses, dropping and moments: interpreted here, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from image_losses_accuracy import near_the_truth, run
from moments_accuracy import near_the_truth as moments_near_the_truth

from unic_kernels.distill_loss import distill_loss
from unic_kernels.drop_coefficients import drop_coefficients, drop_coefficients_ref
from unic_kernels.drop_coefficients.cases import CASES as DROP_CASES
from unic_kernels.image_losses import image_losses, image_losses_ref
from unic_kernels.image_losses.cases import BOTH, Case
from unic_kernels.image_losses.cases import CASES as LOSS_CASES
from unic_kernels.moments import moments
from unic_kernels.moments.cases import CASES as MOMENTS_CASES

HERE = Path(__file__).resolve().parent


def test_in_the_interpreter():
    """All of interpreted_losses.py, in a process that interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_losses.py"],
        cwd=HERE,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("raw", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_losses_near_the_truth_on_the_device(case, dtype, raw):
    near_the_truth(case, case.make(dtype, "cuda", raw))


@pytest.mark.gpu
@pytest.mark.parametrize("case", DROP_CASES, ids=str)
def test_dropping_on_the_device(case):
    given = case.make("cuda")
    found_TB = drop_coefficients(*given, **case.options)
    want_TB = drop_coefficients_ref(*given, **case.options)
    torch.testing.assert_close(found_TB, want_TB, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", MOMENTS_CASES[:-1], ids=str)
def test_moments_on_the_device(case, dtype):
    moments_near_the_truth(case, dtype, "cuda")


LARGE = Case(
    name="as trained",
    images=64,
    patches=256,
    widths=(768, 1024, 1280, 1536),
    distances=((BOTH, BOTH),) * 4,
    strided=True,
)


@pytest.mark.gpu
def test_a_hundred_runs_are_bitwise_equal():
    given = LARGE.make(torch.bfloat16, "cuda")
    first = run(image_losses, LARGE, given)
    first_SC = moments(given.target[3][1])
    for _ in range(100):
        again = run(image_losses, LARGE, given)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        assert torch.equal(moments(given.target[3][1]), first_SC)


def whole(given, uniform_TB):
    """Forward and backward of the loss, dropping included."""
    drop = partial(drop_coefficients, weight_T=torch.ones_like(uniform_TB[:, 0]))
    found = distill_loss(
        *given[:4],
        uniform_TB,
        distances=LARGE.distances,
        balance=partial(drop, rate=0.5),
        clamp=LARGE.clamp,
    )
    return torch.autograd.grad(found.loss, given.leaves())


@pytest.mark.gpu
def test_the_host_never_waits():
    given = LARGE.make(torch.bfloat16, "cuda")
    uniform_TB = torch.rand(4, LARGE.images, device="cuda")
    whole(given, uniform_TB)
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole(given, uniform_TB)
        moments(given.target[0][1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_not_slower_than_eager():
    from triton.testing import do_bench

    given = LARGE.make(torch.bfloat16, "cuda")
    ours, eager = (
        do_bench(partial(run, op, LARGE, given)) for op in (image_losses, image_losses_ref)
    )
    assert ours < eager
