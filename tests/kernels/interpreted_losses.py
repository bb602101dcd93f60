"""The kernels of the losses and moments in Triton's interpreter; `test_losses_triton.py` runs this.

TRITON_INTERPRET is read when a kernel is decorated, so this needs a process of its own. Here the
ops take the Triton path for CPU tensors too. Memory comes filled with NaN, between guards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from guarded_memory import GUARD, WIDTH, Guarded, use_triton
from image_losses_accuracy import near_the_truth, run
from moments_accuracy import near_the_truth as moments_near_the_truth
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from unic_kernels.distill_loss import distill_loss
from unic_kernels.drop_coefficients import drop_coefficients, drop_coefficients_ref
from unic_kernels.drop_coefficients import launch as drop_launch
from unic_kernels.drop_coefficients import op as drop_op
from unic_kernels.drop_coefficients.cases import CASES as DROP_CASES
from unic_kernels.image_losses import image_losses, image_losses_ref
from unic_kernels.image_losses import launch as loss_launch
from unic_kernels.image_losses import op as loss_op
from unic_kernels.image_losses.arguments import BackwardArguments, ForwardArguments
from unic_kernels.image_losses.cases import BOTH, Case
from unic_kernels.image_losses.cases import CASES as LOSS_CASES
from unic_kernels.moments import launch as moments_launch
from unic_kernels.moments import moments
from unic_kernels.moments import op as moments_op
from unic_kernels.moments.cases import CASES as MOMENTS_CASES

assert os.environ.get("TRITON_INTERPRET") == "1"

use_triton(loss_op.FORWARD, ForwardArguments, loss_launch.forward)
use_triton(loss_op.BACKWARD, BackwardArguments, loss_launch.backward)
use_triton(drop_op.FORWARD, drop_op.Arguments, drop_launch.drop_coefficients)
use_triton(moments_op.FORWARD, moments_op.Arguments, moments_launch.moments)


def test_memory_is_guarded():
    with Guarded() as mode:
        x = torch.ones(1).new_empty(2, 3)
    assert x.isnan().all() and len(mode.blocks) == 1
    mode.blocks[0][WIDTH + 6] = 0
    assert not mode.blocks[0][-WIDTH:].eq(GUARD).all()


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the launches of kernels."""
    launches, plain = [0], GridExecutor.__call__

    def count(self, *args, **kwargs):
        launches[0] += 1
        return plain(self, *args, **kwargs)

    GridExecutor.__call__ = count
    try:
        yield launches
    finally:
        GridExecutor.__call__ = plain


class Operations(TorchDispatchMode):
    """Operations of torch that would launch a kernel."""

    FREE = ("view", "alias", "detach", "expand", "unsqueeze", "empty", "select", "slice", "unbind")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("aten::") and not any(free in name for free in self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_losses_near_the_truth(case, dtype):
    if dtype == torch.float16 and case is not LOSS_CASES[6]:
        pytest.skip("one case has all that a type changes")
    given = case.make(dtype)
    near_the_truth(case, given)


def test_bf16_features_are_read_right():
    case = LOSS_CASES[3]
    near_the_truth(case, case.make(torch.float32, raw=torch.bfloat16))


def test_an_image_without_gradient_is_not_read():
    case = Case(name="skip", images=3, widths=(24,))
    given = case.make(torch.float32)
    given.grad_TB[:] = torch.tensor([0.5, 0.0, 2.0])
    clean = run(image_losses, case, given)[2:]
    with torch.no_grad():
        for x in (*given.pred[0], *given.target[0]):
            x[1] = torch.nan
    for got, want in zip(run(image_losses, case, given)[2:], clean, strict=True):
        assert torch.equal(got, want) and got[1].eq(0).all()


def test_rows_of_nothing_and_broken_features():
    case = Case(name="broken", clamp=1.0, widths=(24,), kept=2.0)
    given = case.make(torch.float32)
    with torch.no_grad():
        given.pred[0][1][0] = 0
        given.target[0][1][1, 2, 3] = torch.nan
    found = run(image_losses, case, given)
    assert found[0].isnan().tolist() == [[False, True, False]]
    want = run(image_losses_ref, case, given)
    for got, plain in zip(found, want, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("case", DROP_CASES, ids=str)
def test_dropping(case):
    loss_TB, uniform_TB, weight_T = case.make()
    found_TB = drop_coefficients(loss_TB, uniform_TB, weight_T, **case.options)
    want_TB = drop_coefficients_ref(loss_TB, uniform_TB, weight_T, **case.options)
    torch.testing.assert_close(found_TB, want_TB, rtol=1e-6, atol=0)


def test_dropping_what_is_no_number_as_torch_does():
    loss_TB = torch.tensor([[1.0, torch.nan, 2.0], [3.0, 1.0, 2.0], [torch.inf, torch.nan, 1.0]])
    given = loss_TB, torch.zeros(3, 3), torch.ones(3)
    found_TB = drop_coefficients(*given, rate=1.0)
    want_TB = drop_coefficients_ref(*given, rate=1.0)
    assert torch.equal(found_TB, want_TB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", MOMENTS_CASES[:-1], ids=str)
def test_moments_near_the_truth(case, dtype):
    moments_near_the_truth(case, dtype)


def test_moments_of_nothing_and_of_what_is_not_finite():
    assert torch.equal(moments(torch.empty(0, 7)), torch.zeros(3, 7, dtype=torch.float64))
    x = torch.randn(70, 4)
    x[66, 2] = torch.nan
    x[0, 1] = torch.inf
    assert moments(x)[1:].isfinite().tolist() == [[True, False, False, True]] * 2


@pytest.mark.parametrize("teachers", [1, 4])
def test_launches(teachers):
    """Forward T + 1 for the losses, 1 to drop, 3 of torch; backward T, 1 of torch."""
    case = Case(
        name="count",
        images=2,
        patches=3,
        widths=(16,) * teachers,
        distances=((BOTH, BOTH),) * teachers,
    )
    given = case.make(torch.float32)
    balance = partial(drop_coefficients, weight_T=torch.ones(teachers), rate=0.5)
    uniform_TB = torch.rand(teachers, case.images)
    with counted() as launches, Operations() as operations:
        found = distill_loss(
            *given[:4],
            uniform_TB,
            distances=case.distances,
            balance=balance,
        )
        names = [name for name in operations.names if name != "aten::rand"]
        assert launches[0] == teachers + 2 and sorted(names) == [
            "aten::mean.dim",
            "aten::mul.Tensor",
            "aten::sum",
        ]
        launches[0] = 0
    with counted() as launches:
        found.loss.backward()
        assert launches[0] == teachers
    with counted() as launches:
        moments(given.target[0][1])
        assert launches[0] == 2
