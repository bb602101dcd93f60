"""The ladder's kernels in Triton's interpreter; `test_ladder_triton.py` runs this.

Here the ops take the Triton path for CPU tensors too. Memory comes filled with NaN, between guards,
so that a value which a kernel does not write, or writes out of bounds, shows.
"""

from __future__ import annotations

import pytest
import torch
from guarded_memory import Guarded, use_triton
from ladder_accuracy import UNEVEN, double, error, gradients
from torch import Tensor

from unic_kernels.ladder import RECOMPUTE, ladder_projection, ladder_projection_ref, launch
from unic_kernels.ladder.arguments import BackwardArguments, ForwardArguments
from unic_kernels.ladder.cases import Case
from unic_kernels.ladder.op import BACKWARD, FORWARD

use_triton(FORWARD, ForwardArguments, launch.forward)
use_triton(BACKWARD, BackwardArguments, launch.backward)

CASES = [
    Case(name="M 127", images=1, tokens=127, width=96, layout=((32,), (64,)), out=(40,)),
    Case(name="M 257", images=257, tokens=1, width=200, layout=((24, 24),), out=(20, 33), prefix=0),
    Case(name="M 300", images=3, tokens=100, width=96, layout=((16,) * 4,) * 3, out=(24,) * 4),
    Case(name="uneven", images=6, tokens=23, width=40, layout=UNEVEN, out=(8, 10, 9)),
    Case(name="hardest", images=9, tokens=19, width=96, layout=((48,) * 4,), out=(16,) * 4, drop=1),
    Case(name="kept", images=3, tokens=50, width=64, layout=((32, 32),) * 2, out=(32, 48), drop=0),
    Case(name="none", images=0, tokens=4, width=8, layout=((8, 8),), out=(6, 6)),
]


@pytest.mark.parametrize(
    ("dtype", "recompute"),
    [(torch.float16, "hidden"), *((torch.float32, kind) for kind in RECOMPUTE)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_near_the_truth(case: Case, dtype: torch.dtype, recompute: str) -> None:
    inputs = case.inputs(dtype)
    truth = gradients(ladder_projection_ref, double(inputs))
    eager = error(gradients(ladder_projection_ref, inputs), truth)
    ours = error(gradients(ladder_projection, inputs, recompute=recompute), truth)
    assert [a <= 2 * b + 1e-6 for a, b in zip(ours, eager, strict=True)] == [True] * len(ours), (
        ours,
        eager,
    )


def test_nothing_is_computed_for_dropped_pairs() -> None:
    """Rows of dz that belong to dropped images stay NaN, as their memory came."""
    case = Case(name="", images=5, tokens=30, width=32, layout=((16, 16),), out=(16, 16), drop=0)
    inputs = case.inputs(torch.float32)
    for teacher, dropped in ((0, [1, 2]), (1, [0, 2, 4])):
        inputs.dy[teacher][dropped] = 0
    given = inputs.forward_arguments("none")
    _, z, _ = launch.forward(given)
    with Guarded():
        kept, _ = launch.find_kept(inputs.dy)
        dz, _ = launch.hidden_grad(inputs.dy, inputs.w2, z, given.layout, kept)
    assert kept.count_T.tolist() == [3, 2]
    for teacher, images in ((0, [0, 3, 4]), (1, [1, 3])):
        dz_BNK = given.layout.matrix_of(dz, teacher, 150).unflatten(0, (5, 30))
        written_B = dz_BNK.isfinite().all(2).all(1)
        assert written_B.nonzero().flatten().tolist() == images
        assert dz_BNK[~written_B].isnan().all()


def test_what_dropped_images_hold_reaches_nothing() -> None:
    case = Case(name="", images=4, tokens=40, width=32, layout=((16, 16),), out=(16, 16), drop=0)
    inputs = case.inputs(torch.float32)
    for dy_BNC in inputs.dy:
        dy_BNC[2] = 0
    before = gradients(ladder_projection, inputs)
    for x_BND in inputs.x:
        x_BND[2] = torch.nan
    after: list[Tensor] = gradients(ladder_projection, inputs)
    for a, b in zip(before[2:], after[2:], strict=True):
        assert torch.equal(a, b)
