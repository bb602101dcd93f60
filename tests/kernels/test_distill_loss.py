"""Dropping in one launch, and the whole loss, against the loss that trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from unic_ds import config
from unic_ds.config import Drop, Loss
from unic_ds.losses.balancer import Balancer
from unic_ds.losses.distill import distill_loss as plain_distill_loss
from unic_ds.losses.dropping import Dropping
from unic_ds.tokens import Target, Tokens
from unic_kernels.distill_loss import distill_loss
from unic_kernels.drop_coefficients import drop_coefficients
from unic_kernels.drop_coefficients.cases import CASES
from unic_kernels.image_losses.cases import CASES as LOSS_CASES
from unic_kernels.ops import REFERENCE

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "loss.npz", allow_pickle=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_drops_as_the_balancer_does(case):
    loss_TB, uniform_TB, weight_T = case.make()
    drop = Drop(rate=case.rate, unit=case.unit, keep_hardest=case.keep_hardest)
    want_TB = Dropping(weight_T, drop, case.divisor)(loss_TB, uniform_TB)
    found_TB = drop_coefficients(loss_TB, uniform_TB, weight_T / weight_T.mean(), **case.options)
    torch.testing.assert_close(found_TB, want_TB, rtol=1e-6, atol=0)
    if case.keep_hardest and case.unit == "image":
        assert found_TB.gather(0, loss_TB.argmax(0, keepdim=True)).gt(0).all()


def test_dropping_passes_opcheck_and_has_no_gradient():
    loss_TB, uniform_TB, weight_T = CASES[1].make()
    op = torch.ops.unic_kernels.drop_coefficients.default
    torch.library.opcheck(op, (loss_TB, uniform_TB, weight_T, 0.5, [True, False, True]))
    found_TB = drop_coefficients(loss_TB.requires_grad_(), uniform_TB, weight_T, rate=0.5)
    assert not found_TB.requires_grad


def test_mistakes_are_named():
    loss_TB, uniform_TB, weight_T = CASES[1].make()
    with pytest.raises(ValueError, match="one shape"):
        drop_coefficients(loss_TB, uniform_TB[1:], weight_T, rate=0.5)
    with pytest.raises(ValueError, match="4 teachers"):
        drop_coefficients(loss_TB, uniform_TB, weight_T[:2], rate=0.5)
    with pytest.raises(ValueError, match="rate must be"):
        drop_coefficients(loss_TB, uniform_TB, weight_T, rate=1.0, keep_hardest=False)


def whole(case, given, uniform_TB: Tensor, balance):
    return distill_loss(
        *given[:4], uniform_TB, distances=case.distances, balance=balance, clamp=case.clamp
    )


@pytest.mark.parametrize("number", range(5))
def test_equals_the_published_vectors(number):
    prefix = f"case{number}_"
    take = {k.removeprefix(prefix): VECTORS[k] for k in VECTORS.files if k.startswith(prefix)}
    names = [str(name) for name in take["teachers"]]

    def side(which: str, *, learned: bool):
        return [
            tuple(
                torch.from_numpy(take[f"{which}_{name}_{kind}"]).requires_grad_(learned)
                for kind in ("cls", "patch")
            )
            for name in names
        ]

    pred, target = side("pred", learned=True), side("target", learned=False)
    widths = [pair[0].shape[1] for pair in pred]
    drop = partial(
        drop_coefficients,
        weight_T=torch.ones(len(names)),
        rate=float(take["drop_prob"]),
        divisor="kept",
    )
    found = distill_loss(
        pred,
        target,
        [torch.zeros(2, width) for width in widths],
        [torch.ones(2, width) for width in widths],
        torch.from_numpy(take["uniform_TB"]),
        distances=[Loss().distance] * len(names),
        balance=drop,
        eps=0.0,
    )
    assert found.loss.item() == pytest.approx(float(take["loss"]), rel=1e-5)
    torch.testing.assert_close(
        found.loss_TB, torch.from_numpy(take["loss_TB"]), rtol=1e-5, atol=1e-6
    )
    assert found.weight_TB.sum(1).tolist() == pytest.approx(take["coeff_T"].tolist(), rel=1e-5)
    found.loss.backward()
    for name, pair in zip(names, pred, strict=True):
        for kind, x in zip(("cls", "patch"), pair, strict=True):
            want = torch.from_numpy(take[f"grad_{name}_{kind}"])
            torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-8)


def test_takes_any_balancer_and_gives_the_metrics_that_train():
    case = LOSS_CASES[6]
    given = case.make(torch.float32)
    uniform_TB = torch.rand(len(case.widths), case.images)
    found = whole(case, given, uniform_TB, Balancer(torch.tensor([1.0, 2, 3, 2])))
    scaled = zip(given.target, given.mean, given.std, strict=True)
    target = [
        Tokens(*((x - m) / (s + 1e-6) for x, m, s in zip(pair, mean, std, strict=True)))
        for pair, mean, std in scaled
    ]
    names = [f"t{i}" for i in range(len(case.widths))]
    want, metrics = plain_distill_loss(
        {name: Tokens(*pair) for name, pair in zip(names, given.pred, strict=True)},
        {name: Target.of(tokens, case.clamp) for name, tokens in zip(names, target, strict=True)},
        uniform_TB,
        loss=Loss(),
        balance=Balancer(torch.tensor([1.0, 2, 3, 2])),
        distances={n: config.Distance(*d) for n, d in zip(names, case.distances, strict=True)},
        ops=REFERENCE,
    )
    torch.testing.assert_close(found.loss, want, rtol=1e-6, atol=1e-7)
    for key, value in metrics.items():
        name, _, rest = key.partition("/")
        kind, _, term = rest.partition("_")
        if kind in ("cls", "patch"):
            at = names.index(name), ("cls", "patch").index(kind), int(term == "smooth_l1")
            torch.testing.assert_close(found.gap_T22[at], value, rtol=1e-5, atol=1e-6)


def test_compiles_as_one_graph():
    case = LOSS_CASES[1]
    given = case.make(torch.float32)
    balance = partial(drop_coefficients, weight_T=torch.ones(1), rate=0.5)
    compiled = torch.compile(distill_loss, fullgraph=True, backend="aot_eager")
    uniform_TB = torch.rand(1, case.images)
    want = whole(case, given, uniform_TB, balance)
    found = compiled(
        *given[:4], uniform_TB, distances=case.distances, balance=balance, clamp=case.clamp
    )
    torch.testing.assert_close(tuple(found), tuple(want))
