"""Count, mean and M2 of channels on CPU."""

from __future__ import annotations

import pytest
import torch
from moments_accuracy import near_the_truth

from unic_kernels.moments import moments, moments_ref
from unic_kernels.moments.cases import CASES

OP = torch.ops.unic_kernels.moments.default
FILLED = [case for case in CASES if 0 not in case.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FILLED, ids=str)
def test_near_the_truth(case, dtype):
    near_the_truth(case, dtype)


def test_of_no_rows_is_nothing():
    assert torch.equal(moments(torch.empty(0, 7)), torch.zeros(3, 7, dtype=torch.float64))


def test_what_is_not_finite_is_seen():
    x = torch.randn(9, 4)
    x[3, 2] = torch.nan
    x[0, 1] = torch.inf
    finite_SC = moments(x)[1:].isfinite()
    assert finite_SC.tolist() == [[True, False, False, True]] * 2


def test_a_large_mean_takes_nothing_from_the_spread():
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 3e4
    truth_SC = moments_ref(x.double())
    torch.testing.assert_close(moments(x), truth_SC, rtol=1e-6, atol=0)


def test_passes_opcheck_and_compiles():
    x = CASES[4].make(torch.float32)
    torch.library.opcheck(OP, (x,))
    compiled = torch.compile(moments, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), moments(x))
    assert not moments(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("x", [torch.zeros(4), torch.zeros(2, 3, dtype=torch.int64)])
def test_mistakes_are_named(x):
    with pytest.raises(ValueError, match="floats"):
        moments(x)
