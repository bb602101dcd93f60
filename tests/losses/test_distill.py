"""The loss against the published vectors, and what dropping promises."""

from pathlib import Path

import numpy as np
import parity
import pytest
import torch

from unic_ds.config import Drop, Loss
from unic_ds.losses.balance import Balancer, Dropping
from unic_ds.losses.distill import distill_loss, no_gather
from unic_ds.losses.terms import TERMS, Context
from unic_ds.tokens import Target, Tokens
from unic_kernels.ops import KERNELS

VECTORS = Path(__file__).parents[1] / "vectors" / "loss.npz"


@pytest.mark.parametrize("kernels", KERNELS)
def test_equals_the_published_vectors(kernels):
    assert parity.over(parity.check_loss(VECTORS, KERNELS[kernels])) == []


def random_batch(images, teachers=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def side():
        return {
            f"t{i}": Tokens(
                torch.randn(images, 6 + i, generator=g), torch.randn(images, 4, 6 + i, generator=g)
            )
            for i in range(teachers)
        }

    pred = side()
    target = {name: Target.of(tokens) for name, tokens in side().items()}
    return pred, target, torch.rand(teachers, images, generator=g)


def part(sides, rows):
    """Some images of all predictions, or of all targets."""

    def cut(side):
        if isinstance(side, Target):
            return side._replace(features=cut(side.features))
        return Tokens(*(x[rows] for x in side))

    return {name: cut(side) for name, side in sides.items()}


def test_how_a_batch_is_split_does_not_matter():
    pred, target, uniform_TB = random_batch(8)
    kinds = {"loss": Loss(), "balance": Dropping(torch.ones(3), Drop(rate=0.5), "expected")}
    whole, metrics = distill_loss(pred, target, uniform_TB, **kinds)
    assert metrics["loss"].item() == whole.item()
    halves = [
        distill_loss(part(pred, r), part(target, r), uniform_TB[:, r], **kinds)[0]
        for r in (slice(0, 4), slice(4, 8))
    ]
    assert whole.item() == pytest.approx((halves[0].item() + halves[1].item()) / 2, rel=1e-6)


@pytest.mark.parametrize("loss", [Loss(), Loss(cls="contrastive", patch="none")])
def test_each_averages_the_rungs(loss):
    pred, target, uniform_TB = random_batch(5, teachers=1)
    other, _, _ = random_batch(5, teachers=1, seed=9)
    both = Tokens(*(torch.stack([a, b]) for a, b in zip(pred["t0"], other["t0"], strict=True)))
    pairs = [
        distill_loss(p, target, uniform_TB, loss=loss, balance=Balancer(torch.ones(1)))
        for p in (pred, other, {"t0": both})
    ]
    for key, value in pairs[2][1].items():
        torch.testing.assert_close(value, (pairs[0][1][key] + pairs[1][1][key]) / 2, msg=key)


def plain_distance(pred, target, term, temperature):
    """One term of every token by its formula, in numpy and fp64."""
    p, t = pred.double().numpy(), target.double().numpy()
    if term == "mse":
        return ((p - t) ** 2).mean(-1)
    if term == "smooth_l1":
        gap = np.abs(p - t)
        return np.where(gap < 1, gap**2 / 2, gap - 0.5).mean(-1)
    p, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (p, t))
    if term == "cosine":
        return 1 - (p * t).sum(-1)
    logits = np.exp(p @ t.T / temperature)
    return -np.log(np.diag(logits) / logits.sum(1))


@pytest.mark.parametrize("name", TERMS)
def test_a_term_in_plain_torch_is_its_formula(name):
    pred, target, _ = random_batch(6, teachers=1)
    pair = pred["t0"].cls_BC, target["t0"].features.cls_BC
    found_B = TERMS[name](*pair, Context(0.2, no_gather))
    np.testing.assert_allclose(found_B, plain_distance(*pair, name, 0.2), rtol=1e-5)


@pytest.mark.parametrize(
    ("cls", "patch"),
    [
        ("1 cosine", "0.9 cosine + 0.1 smooth_l1"),
        ("none", "0.9 cosine + 0.1 smooth_l1"),
        ("contrastive", "none"),
        ("0.5*cosine + 0.5*smooth_l1 + 2 mse", "mse"),
        (".3 contrastive + cosine", "cosine"),
    ],
)
def test_a_weighted_sum_of_terms_is_its_formula(cls, patch):
    loss = Loss(cls=cls, patch=patch, temperature=0.2)
    pred, target, uniform_TB = random_batch(6, teachers=2)
    found, metrics = distill_loss(
        pred, target, uniform_TB, loss=loss, balance=Balancer(torch.ones(2))
    )
    want = []
    for name in pred:
        kinds = []
        for terms, p, t in zip(loss.distance, pred[name], target[name].features, strict=True):
            parts = [w * plain_distance(p, t, term, 0.2) for term, w in terms.items()]
            if parts:
                kinds.append(sum(parts).reshape(6, -1).mean(1))
        want.append(np.mean(kinds))
    assert found.item() == pytest.approx(np.mean(want), rel=1e-5)
    assert any("cls" in key for key in metrics) == (cls != "none")


def test_negatives_come_from_all_ranks():
    pred, target, uniform_TB = random_batch(8, teachers=1)
    kinds = {"loss": Loss(cls="contrastive", patch="none"), "balance": Balancer(torch.ones(1))}
    whole, _ = distill_loss(pred, target, uniform_TB, **kinds)
    all_8C = target["t0"].features.cls_BC
    shares = [
        distill_loss(
            part(pred, rows),
            part(target, rows),
            uniform_TB[:, rows],
            **kinds,
            all_gather_fn=lambda _, rows=rows: (all_8C, rows.start),
        )[0]
        for rows in (slice(0, 4), slice(4, 8))
    ]
    assert whole.item() == pytest.approx(sum(shares).item() / 2, rel=1e-6)


def test_a_teacher_may_have_its_own_distance():
    pred, target, uniform_TB = random_batch(5, teachers=2)
    own = Loss(cls="none", patch="mse").distance
    balance = Balancer(torch.ones(2))
    apart = [
        distill_loss({n: pred[n]}, target, uniform_TB, loss=loss, balance=Balancer(torch.ones(1)))
        for n, loss in (("t0", Loss()), ("t1", Loss(cls="none", patch="mse")))
    ]
    both, metrics = distill_loss(
        pred, target, uniform_TB, loss=Loss(), balance=balance, distances={"t1": own}
    )
    assert both.item() == pytest.approx((apart[0][0] + apart[1][0]).item() / 2, rel=1e-6)
    assert "t1/cls_cosine" not in metrics
