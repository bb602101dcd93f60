"""The loss op on CPU: as near to the truth as eager torch, and a good citizen of torch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from image_losses_accuracy import doubled, near_the_truth, run
from torch import Tensor

from unic_kernels.image_losses import image_losses, image_losses_ref
from unic_kernels.image_losses.cases import ALL, BOTH, CASES, Case, Example
from unic_kernels.image_losses.op import forward_arguments

FORWARD = torch.ops.unic_kernels.image_losses.default
BACKWARD = torch.ops.unic_kernels.image_losses_backward.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_near_the_truth(case, dtype):
    near_the_truth(case, case.make(dtype))


def test_predictions_in_fp32_against_features_in_bf16():
    case = CASES[-3]
    near_the_truth(case, case.make(torch.float32, raw=torch.bfloat16))


@pytest.mark.parametrize("size", [0.0, 1e-10, 1e-8, 1e-7])
@pytest.mark.parametrize("side", ["pred", "target"])
def test_tiny_rows_as_torch_has_them(size, side):
    case = Case(name="tiny", widths=(16,), distances=(({"cosine": 1.0}, ALL),), clamp=0.0, kept=2)
    given = case.make(torch.float32)
    given.mean[0].zero_()
    given.std[0].fill_(1 - 1e-6)
    with torch.no_grad():
        for x in getattr(given, side)[0]:
            x *= size
    found, want = run(image_losses, case, given), run(image_losses_ref, case, given)
    for got, plain in zip(found, want, strict=True):
        assert got.isfinite().all()
        # A gradient is up to 1 / |p| large, and its terms cancel.
        atol = 1e-6 * max(1.0, plain.abs().max().item())
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_gradcheck(case):
    small = Case(
        name=case.name,
        images=2,
        patches=3,
        widths=tuple(range(3, 3 + len(case.widths))),
        distances=case.distances,
        strided=case.strided,
    )
    given = doubled(small.make(torch.float64))
    # Distances of exactly 1 have a kink; far from it there is none.
    leaves = given.leaves()

    def losses(*tensors: Tensor) -> Tensor:
        pred = [(a, b) for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
        found_TB, _ = image_losses(
            pred, given.target, given.mean, given.std, distances=small.distances, clamp=5.0
        )
        return found_TB

    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=str)
def test_opcheck(case):
    given = case.make(torch.float32)
    plain = forward_arguments(*given[:4], case.distances, case.clamp, 1e-6)
    torch.library.opcheck(FORWARD, plain)
    detached = plain._replace(pred=[x.detach() for x in plain.pred])
    torch.library.opcheck(BACKWARD, (*detached, FORWARD(*detached)[2], given.grad_TB))


def test_compiles_as_one_graph():
    case = CASES[6]
    given = case.make(torch.float32)
    compiled = torch.compile(image_losses, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, case, given), run(image_losses, case, given), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def test_an_image_without_gradient_is_not_read():
    case = Case(name="skip", images=4)
    given = case.make(torch.float32)
    given.grad_TB[:] = torch.tensor([0.5, 0.0, 2.0, 0.0])
    clean = run(image_losses, case, given)[2:]
    with torch.no_grad():
        for x in (*given.pred[0], *given.target[0]):
            x[1::2] = torch.nan
    for got, want in zip(run(image_losses, case, given)[2:], clean, strict=True):
        assert torch.equal(got, want)
        assert got[1::2].eq(0).all() and got[::2].ne(0).any()


def test_a_broken_feature_is_seen():
    case = Case(name="broken", clamp=1.0)
    given = case.make(torch.float32)
    given.target[0][1].data[1, 2, 3] = torch.nan
    loss_TB = run(image_losses, case, given)[0]
    assert loss_TB.isnan().tolist() == [[False, True, False]]


def test_only_references_and_row_statistics_are_saved():
    case = CASES[6]
    given = case.make(torch.bfloat16)
    inputs = {x.data_ptr() for side in (given.pred, given.target) for pair in side for x in pair}
    inputs |= {x.data_ptr() for x in (*given.mean, *given.std)}
    fresh: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in inputs:
            fresh.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        image_losses(*given[:4], distances=case.distances)
    assert [x.shape for x in fresh] == [(len(case.widths), case.images, 1 + case.patches, 3)]


def test_no_images():
    case = Case(name="none", images=0)
    found = run(image_losses, case, case.make(torch.float32))
    assert [x.numel() for x in found] == [0, 0, 0, 0]


def test_mistakes_are_named():
    case = Case(name="wrong", widths=(8, 12), distances=((BOTH, BOTH), (BOTH, BOTH)))
    given = case.make(torch.float32)
    pred, target, mean, std, _ = given

    def mistake(match, *args, distances=case.distances):
        with pytest.raises(ValueError, match=match):
            image_losses(*args, distances=distances)

    mistake("one entry a teacher", pred[:1], target, mean, std)
    mistake("contrastive", pred, target, mean, std, distances=(({"contrastive": 1}, {}),) * 2)
    mistake("no terms", pred, target, mean, std, distances=(({}, {}),) * 2)
    mistake(r"teacher 0, kind 0.*\(3, 8\), \(3, 12\)", pred, target[::-1], mean, std)
    mistake("two dtypes", [(pred[0][0].double(), pred[0][1]), pred[1]], target, mean, std)
    fewer = [tuple(x[:2] for x in pair) for pair in (pred[1], target[1])]
    mistake("2 images, others 3", [pred[0], fewer[0]], [target[0], fewer[1]], mean, std)


def test_rungs_each_on_its_own_are_more_entries():
    case = Case(name="rungs", widths=(20, 20))
    given = case.make(torch.float32)
    twice = {"distances": ((BOTH, ALL),) * 2, "clamp": 3.0}
    shared = ([given.target[0]] * 2, [given.mean[0]] * 2, [given.std[0]] * 2)
    found_TB, _ = image_losses(given.pred, *shared, **twice)
    for i, (first, last) in enumerate(pairwise(range(3))):
        rest = (given.target[:1], given.mean[:1], given.std[:1])
        one_TB, _ = image_losses(given.pred[first:last], *rest, distances=((BOTH, ALL),), clamp=3.0)
        torch.testing.assert_close(found_TB[i], one_TB[0])


def test_entries_may_have_other_numbers_of_patch_tokens():
    """Two groups of the op, put back in order; an entry without patch tokens is in the first."""
    sizes = {9: 12, 4: 7, 25: 8, 16: 10}  # patch tokens -> channels
    parts = [
        Case(name=str(n), patches=n, widths=(w,)).make(torch.float32) for n, w in sizes.items()
    ]
    parts.append(Case(name="as the first", patches=9, widths=(16,)).make(torch.float32))
    pred, target, mean, std = ([part[side][0] for part in parts] for side in range(4))
    given = Example(pred, target, mean, std, torch.cat([part.grad_TB for part in parts]))
    distances = ((BOTH, BOTH), (ALL, {}), ({}, ALL), (BOTH, ALL), (ALL, BOTH))
    near_the_truth(Case(name="grids", distances=distances, clamp=3.0), given)
