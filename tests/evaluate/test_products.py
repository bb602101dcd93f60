"""Products of matrices against fp64."""

from __future__ import annotations

import pytest
import torch

from unic_ds.evaluate.heads import Heads
from unic_ds.evaluate.products import HAS_AVX512, USES_ONEDNN, block_on, product

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("rows, others, width", [(37, 23, 769), (1, 1, 1), (0, 4, 3), (4, 3, 0)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_fp64(
    rows: int, others: int, width: int, transposed: bool, dtype: torch.dtype
) -> None:
    made = torch.Generator().manual_seed(rows)
    a_MK, b_NK, bias_N = (
        torch.randn(shape, generator=made, dtype=dtype)
        for shape in ((rows, width), (others, width), (others,))
    )
    if transposed:
        a_MK, b_NK = (x.T.contiguous().T for x in (a_MK, b_NK))
    expected_MN = a_MK.double() @ b_NK.double().T
    for bias, sum_MN in ((None, expected_MN), (bias_N, expected_MN + bias_N)):
        found_MN = product(a_MK, b_NK, bias)
        assert found_MN.dtype == dtype
        # A sum of `width` terms near 1 is about width**0.5 and is rounded `width` times.
        bound = 4 * torch.finfo(dtype).eps * (width + 1)
        assert torch.allclose(found_MN.double(), sum_MN, rtol=0, atol=bound)


def test_equal_rows_have_equal_products_in_blocks_of_any_size() -> None:
    """Ties between neighbours depend on it."""
    made = torch.Generator().manual_seed(0)
    row_NC, query_QC = (torch.randn(n, 100, generator=made) for n in (301, 50))
    for rows in (7 * 301, 1999, 37):
        parts = [product(query_QC, part) for part in row_NC.repeat(7, 1).split(rows)]
        found_Q7N = torch.cat(parts, 1).unflatten(1, (7, 301))
        assert torch.equal(found_Q7N, found_Q7N[:, :1].expand_as(found_Q7N))


def test_a_batch_without_rows_on_this_rank_decays_the_weights_alone() -> None:
    heads = Heads(5, 3, rate_P=torch.ones(2), decay_P=torch.tensor([0.0, 0.5]))
    heads.weight_PLD.fill_(1.0)
    heads.step(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), factor=1)
    assert heads.weight_PLD[:, 0, 0].tolist() == [1.0, 0.5] and heads.finite_P.all()


def test_a_cpu_has_onednn_and_small_blocks() -> None:
    assert USES_ONEDNN == HAS_AVX512
    assert block_on(torch.device("cpu"), 2**30) == 2**22 and block_on(torch.device("cpu"), 7) == 7
    assert block_on(torch.device("cuda"), 2**30) == 2**30


@pytest.mark.parametrize("bias_N", [torch.randn(46)[::2], torch.tensor(1.5).expand(23)])
def test_a_bias_of_any_strides_and_only_of_the_same_type(bias_N: torch.Tensor) -> None:
    a_MK, b_NK = torch.randn(37, 64), torch.randn(23, 64)
    expected_MN = a_MK.double() @ b_NK.double().T + bias_N.double()
    assert torch.allclose(product(a_MK, b_NK, bias_N).double(), expected_MN, atol=1e-4)
    with pytest.raises(RuntimeError, match="dtype"):
        product(a_MK, b_NK, bias_N.double())
