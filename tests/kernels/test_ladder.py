"""The ladder op on CPU tensors: right against fp64, in every gradient, type and odd shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ladder_accuracy import SMALL, UNEVEN, double, error, gradients
from torch import Tensor
from torch.nn import functional as F

from unic_kernels import ladder
from unic_kernels.ladder import RECOMPUTE, cpu, ladder_projection, ladder_projection_ref
from unic_kernels.ladder.cases import Case
from unic_kernels.ladder.layout import Layout
from unic_kernels.ladder.op import BACKWARD, FORWARD


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_near_the_truth(case: Case, dtype: torch.dtype, recompute: str) -> None:
    inputs = case.inputs(dtype)
    truth = gradients(ladder_projection_ref, double(inputs))
    eager = error(gradients(ladder_projection_ref, inputs), truth)
    ours = error(gradients(ladder_projection, inputs, recompute=recompute), truth)
    assert len(ours) == 3 * len(case.out) + 3 * len(case.layout)
    assert [a <= 2 * b + 1e-6 for a, b in zip(ours, eager, strict=True)] == [True] * len(ours)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("layout", [((3, 3), (4, 4)), ((3, 0), (2, 4))], ids=["even", "uneven"])
def test_gradcheck(layout: tuple[tuple[int, ...], ...], recompute: str) -> None:
    case = Case(name="tiny", images=2, tokens=3, width=4, layout=layout, out=(3, 2))
    inputs = case.inputs(torch.float64)
    leaves = [t.detach().requires_grad_() for group in inputs[:5] for t in group]

    def op(*flat: Tensor) -> tuple[Tensor, ...]:
        rest = list(flat)
        groups = [[rest.pop(0) for _ in group] for group in inputs[:5]]
        return tuple(ladder_projection(*groups, layout, recompute=recompute))

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_opcheck(recompute: str) -> None:
    inputs = SMALL[1].inputs(torch.float32)
    given = inputs.forward_arguments(recompute)
    args = [[t.detach().requires_grad_() for t in group] for group in given[:5]]
    torch.library.opcheck(FORWARD, (*args, given.widths, recompute))
    with torch.no_grad():
        _, z, h = FORWARD(*given)
    for need_x in (True, False):
        torch.library.opcheck(BACKWARD, inputs.backward_arguments(z, h, recompute, need_x=need_x))


def test_compiles_whole() -> None:
    inputs = SMALL[0].inputs(torch.float32)

    def twice(*args: list[Tensor], **options: str) -> list[Tensor]:
        return [y * 2 for y in ladder_projection(*args, **options)]  # type: ignore[arg-type]

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, inputs), gradients(twice, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_dropped_rows_cannot_leak() -> None:
    """Whatever the tokens of an image are that every teacher drops, no gradient sees them."""
    case = Case(name="", images=4, tokens=5, width=8, layout=((8, 8),) * 2, out=(6, 6), drop=0)
    inputs = case.inputs(torch.float32)
    for dy_BNC in inputs.dy:
        dy_BNC[2] = 0
    before = gradients(ladder_projection, inputs)
    for x_BND in inputs.x:
        x_BND[2] = torch.nan
    after = gradients(ladder_projection, inputs)
    for a, b in zip(before[2:], after[2:], strict=True):
        assert torch.equal(a, b)
    assert all(not grad[2].any() for grad in after[2:4])


def test_a_nan_gradient_is_no_dropped_one() -> None:
    inputs = SMALL[4].inputs(torch.float32)
    inputs.dy[0].zero_()
    inputs.dy[0][1, 2, 3] = torch.nan
    assert gradients(ladder_projection, inputs)[2][1].isnan().any()


def test_what_is_unused_or_expanded() -> None:
    """A prediction that no loss reads, a loss that is a plain sum, tokens without gradients."""
    x, w1, b1, w2, b2, layout, _ = SMALL[0].inputs(torch.float32)
    w2 = [w.requires_grad_() for w in w2]
    for op in (ladder_projection, ladder_projection_ref):
        op(x, w1, b1, w2, b2, layout)[0].sum().backward()
    assert w2[0].grad is not None and (w2[1].grad is None or not w2[1].grad.any())
    h = ladder_projection_ref(
        x, w1, b1, [torch.eye(w.shape[1]) for w in w2], [torch.zeros(())] * 2, layout
    )  # type: ignore[list-item]
    torch.testing.assert_close(w2[0].grad, 2 * h[0].sum((0, 1)).expand_as(w2[0]))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"recompute": "some"}, "recompute must be one of none, hidden, all, got 'some'"),
        ({"layout": ((16, 16),)}, r"1 rungs and 2 teachers .* got \(2, 2, 2, 2, 2\)"),
        ({"layout": ((16, 16), (48, 40))}, r"w1\[1\] must be \(88, 24\), got \(96, 24\)"),
        ({"layout": ((0, 32), (0, 96))}, "teacher 0 has no projector on any rung"),
        ({"x": [torch.zeros(5, 24)] * 2}, r"x must be \[images, tokens, width\], got \(5, 24\)"),
        ({"x": [torch.zeros(5, 9, 24).half()] * 2}, "share one type, .*float16.*float32"),
        ({"b2": [torch.zeros(20), torch.zeros(20)]}, r"b2\[1\] must be \(33,\), got \(20,\)"),
    ],
)
def test_errors_speak(change: dict[str, object], says: str) -> None:
    inputs = SMALL[0].inputs(torch.float32)._asdict()
    del inputs["dy"]
    with pytest.raises(ValueError, match=says):
        ladder_projection(**(inputs | change))  # type: ignore[arg-type]


def test_layout() -> None:
    layout = Layout(UNEVEN)
    assert layout.width_T == (11, 30, 19) and layout.column0_T == (0, 11, 41)
    assert layout.block(2, 2) == (2, 24, 7, 12) and layout.block(0, 1) is None
    assert not layout.even and Layout(((2, 2), (4, 4))).even
    flat = torch.arange(2.0 * layout.total)
    assert torch.equal(torch.cat([layout.matrix_of(flat, t, 2).flatten() for t in range(3)]), flat)


def test_kept_images() -> None:
    """Nothing is gathered where every image has a gradient."""
    dy_BNC = torch.zeros(4, 3, 2)
    dy_BNC[[0, 3], [1, 2], 1] = 1e-30
    kept_B = cpu.kept_images(dy_BNC)
    assert kept_B is not None and kept_B.tolist() == [0, 3]
    assert cpu.kept_images(dy_BNC[[0, 3]]) is None


def test_the_readme_shows_two_ways_to_one_result() -> None:
    text = (Path(ladder.__file__).parents[2] / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    L, T, D, H, C = 3, 2, 8, 16, 5
    x = [torch.randn(2, 4, D) for _ in range(L)]
    w1, b1, w2 = (
        [[torch.randn(*shape) / 4 for _ in range(T)] for _ in range(L)]
        for shape in ((H, D), (H,), (C, H))
    )
    names = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": [torch.randn(C) for _ in range(T)]}
    names |= {"L": L, "T": T, "H": H, "F": F, "torch": torch}
    exec(code, found := names | {"ladder_projection": ladder_projection})
    torch.testing.assert_close(found["fused"], found["plain"])
