"""Balancers: losses per (teacher, image) in, coefficients out; each against its formula."""

import numpy as np
import pytest
import torch

from unic_ds import config
from unic_ds.config import Balance, Config, Drop, Loss, Teacher
from unic_ds.losses import balance
from unic_ds.losses.balance import AdaLoss, Balancer, Dropping

WEIGHTS = (1.0, 3.0, 0.5)


def random_losses(images, seed=0, teachers=3):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(teachers, images, generator=g) + 0.1, torch.rand(
        teachers, images, generator=g
    )


def made(kind, **more):
    rows = [Teacher(name=f"t{i}", source="timm:x", weight=w) for i, w in enumerate(WEIGHTS)]
    return balance.build(Config(teachers=tuple(rows), balance=Balance(kind=kind), **more))


def test_none_is_a_plain_mean():
    loss_TB, uniform_TB = random_losses(7)
    weight_TB = Balancer(torch.ones(3))(loss_TB, uniform_TB)
    assert (loss_TB * weight_TB).sum().item() == pytest.approx(loss_TB.mean().item(), rel=1e-6)


def test_fixed_weighs_teachers_by_their_rows():
    loss_TB, uniform_TB = random_losses(7)
    share_T = made("fixed")(loss_TB, uniform_TB).sum(1)
    np.testing.assert_allclose(share_T, np.array(WEIGHTS) / sum(WEIGHTS), rtol=1e-6)


@pytest.mark.parametrize("divisor", ["expected", "kept"])
@pytest.mark.parametrize("drop", [Drop(rate=0.5), Drop(rate=1.0), Drop(rate=0.3, unit="step")])
def test_dropping_keeps_the_hardest_and_others_by_chance(drop, divisor):
    loss_TB, uniform_TB = random_losses(9)
    if drop.unit == "step":
        uniform_TB = uniform_TB[:, :1].expand(3, 9)
    found_TB = made("dropping", drop=drop, loss=Loss(divisor=divisor))(loss_TB, uniform_TB)
    keep = uniform_TB.numpy() >= drop.rate
    for image in range(9):
        judged = loss_TB.mean(1) if drop.unit == "step" else loss_TB[:, image]
        keep[int(judged.argmax()), image] = True
    divided = keep.sum() if divisor == "kept" else 9 * (1 + 2 * (1 - drop.rate))
    weights = np.array(WEIGHTS)[:, None] / np.mean(WEIGHTS)
    np.testing.assert_allclose(found_TB, weights * keep / divided, rtol=1e-6)


def test_the_expected_divisor_is_the_mean_of_the_kept():
    loss_TB, uniform_TB = random_losses(20_000, teachers=4)
    rates = (Drop(rate=0.5), Drop(rate=0.25), Drop(rate=1.0), Drop(rate=0.5, keep_hardest=False))
    for drop in rates:
        total = Dropping(torch.ones(4), drop, "expected")(loss_TB, uniform_TB).sum().item()
        assert total == pytest.approx(1, abs=0.02), drop


def test_adaloss_weighs_by_the_inverse_running_loss():
    found, running = AdaLoss(torch.ones(3), 0.9), None
    for step in range(4):
        losses = [random_losses(6, seed=10 * step + micro)[0] for micro in range(2)]
        inverse = np.ones(3) if running is None else 1 / running
        want = inverse / inverse.mean() / 18
        for loss_TB in losses:  # two micro batches, one step
            weight_TB = found(loss_TB, loss_TB)
            np.testing.assert_allclose(weight_TB, np.repeat(want[:, None], 6, 1), rtol=1e-5)
        found.track()
        mean = torch.cat(losses, 1).double().mean(1).numpy()
        running = mean if running is None else 0.9 * running + 0.1 * mean


def test_adaloss_is_not_poisoned_and_survives_a_restart():
    one, loss_TB = AdaLoss(torch.ones(3), 0.9), random_losses(5)[0]
    one(loss_TB, loss_TB)
    one.track()
    one(loss_TB * float("nan"), loss_TB)
    one.track()
    two = AdaLoss(torch.ones(3), 0.9)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(loss_TB, loss_TB), two(loss_TB, loss_TB))
    assert one(loss_TB, loss_TB).isfinite().all()


@pytest.mark.parametrize("kind", ["none", "fixed", "dropping", "adaloss"])
def test_coefficients_carry_no_gradient(kind):
    weights = {} if kind == "none" else {"weight": 2.0}
    cfg = Config(
        teachers=(
            Teacher(name="a", source="timm:x", **weights),
            Teacher(name="b", source="timm:y"),
        ),
        balance=Balance(kind=kind),
    )
    loss_TB = random_losses(4, teachers=2)[0].requires_grad_()
    weight_TB = balance.build(cfg)(loss_TB, torch.full((2, 4), 0.7))
    assert not weight_TB.requires_grad
    (loss_TB * weight_TB).sum().backward()
    assert torch.equal(loss_TB.grad, weight_TB)


def test_a_weight_that_would_not_count_is_refused():
    with pytest.raises(ValueError, match=r"teachers.a.weight must be 1 if balance.kind is none"):
        Config(
            teachers=(config.Teacher(name="a", source="timm:x", weight=2.0),),
            balance=Balance(kind="none"),
        )
