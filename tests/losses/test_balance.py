"""Balancers: losses per (teacher, image) in, coefficients out; each against its formula."""

import numpy as np
import pytest
import torch

from unic_ds import config
from unic_ds.config import Balance, Config, Drop, Loss, Teacher
from unic_ds.losses import balance
from unic_ds.losses.balancer import Balancer
from unic_ds.losses.dropping import Dropping
from unic_ds.losses.loss_balancers import AdaLoss, Famo

WEIGHTS = (1.0, 3.0, 0.5)
LEARNING = ("adaloss", "famo")
"""Balancers with a state."""


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


def steps_of(count, images=8):
    """The losses (T, B) of a few steps, which fall at another rate for each teacher."""
    fall_T1 = torch.tensor([[0.9], [0.97], [0.8]])
    return [random_losses(images, seed=step)[0] * fall_T1**step for step in range(count)]


def plain_famo(losses, rate, decay):
    """Shares of every step by the formula in fp64, xi by torch's Adam."""
    xi, before, shares = torch.zeros(3, dtype=torch.float64, requires_grad=True), None, []
    adam = torch.optim.Adam([xi], lr=rate, weight_decay=decay)
    for loss_TB in losses:
        loss_T, z_T = loss_TB.double().mean(1), xi.softmax(0)
        divided_T = z_T / (1 if before is None else before)
        shares.append((divided_T / divided_T.sum()).detach())
        if before is not None:
            (xi.grad,) = torch.autograd.grad(z_T, xi, before.log() - loss_T.log())
            adam.step()
        before = loss_T
    return torch.stack(shares)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_famo_is_its_formula_however_a_step_is_split(parts):
    losses, found, shares = steps_of(40), Famo(torch.ones(3), 0.025, 0.01), []
    for loss_TB in losses:
        weights = [found(part, part) for part in loss_TB.chunk(parts, 1)]
        assert all(torch.equal(weight_TB, weights[0]) for weight_TB in weights)
        shares.append(weights[0].sum(1))
        found.track()
    want = plain_famo(losses, 0.025, 0.01)
    torch.testing.assert_close(torch.stack(shares).double(), want, rtol=1e-4, atol=1e-6)
    assert (want[-1] - want[0]).abs().max() > 0.1


def test_famo_weighs_the_teacher_more_whose_loss_falls_less():
    found, start = Famo(torch.ones(2), 0.025, 0.0), torch.ones(2, 4)
    for step in range(50):
        found(start * torch.tensor([[0.9**step], [0.99**step]]), start)
        found.track()
    slower, faster = found.logit_T[1], found.logit_T[0]
    assert slower - faster > 1


@pytest.mark.parametrize("kind", LEARNING)
def test_a_skipped_step_and_a_restart_change_nothing(kind):
    one, two, losses = made(kind), made(kind), steps_of(6)
    for loss_TB in losses[:3]:
        one(loss_TB, loss_TB)
        one.track(torch.tensor(True))
    before = {name: value.clone() for name, value in one.state_dict().items()}
    for skipped_TB, taken in ((losses[3] * float("nan"), True), (losses[3] * 100, False)):
        one(skipped_TB, skipped_TB)
        one.track(torch.tensor(taken))
    assert before.keys() == one.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())
    two.load_state_dict(before)
    for loss_TB in losses[3:]:
        assert torch.equal(one(loss_TB, loss_TB), two(loss_TB, loss_TB))
        one.track(torch.tensor(True))
        two.track(torch.tensor(True))
    assert any(not torch.equal(before[name], value) for name, value in two.state_dict().items())


@pytest.mark.parametrize("key", ["rate", "decay"])
def test_famos_options_are_checked(key):
    with pytest.raises(ValueError, match=rf"balance.{key} must be .*, got -1"):
        Balance(kind="famo", **{key: -1.0})


@pytest.mark.parametrize("kind", ["none", "fixed", "dropping", "adaloss", "famo"])
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


@pytest.mark.parametrize(
    ("kind", "more", "sentence"),
    [
        ("mgda", {"rungs": "0"}, "teachers.a.rungs must be empty for balance.kind mgda"),
        ("mgda", {"data": "photos"}, "teachers.a.data must be empty for balance.kind mgda"),
        ("famo", {"data": "photos"}, "teachers.a.data must be empty for balance.kind famo"),
        ("none", {"data": " , "}, "teachers.a.data must be sources"),
    ],
)
def test_balancers_that_compare_teachers_refuse_those_that_see_less(kind, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(
            teachers=(Teacher(name="a", source="timm:x", **more),),
            balance=Balance(kind=kind),
        )
