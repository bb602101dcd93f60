"""Lazy dropping: pairs are chosen before the teachers run, by the running losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds.config import Balance, Config, Drop, Loss, Teacher
from unic_ds.losses import balance
from unic_ds.losses.dropping import Dropping, LazyDropping

IMAGES = 16


def lazy(loss: Loss | None = None, **drop: object) -> LazyDropping:
    """The balancer of three teachers, the second with weight 2."""
    rows = tuple(
        Teacher(name=name, source="timm:x", weight=weight)
        for name, weight in (("a", 1.0), ("b", 2.0), ("c", 1.0))
    )
    drop = {"lazy": True, "full_every": 4} | drop
    cfg = Config(
        teachers=rows, drop=Drop(**drop), balance=Balance(momentum=0.5), loss=loss or Loss()
    )
    found = balance.build(cfg)
    assert isinstance(found, LazyDropping)
    return found


def draws(step: int) -> tuple[Tensor, NDArray[np.float64]]:
    """Losses of a micro batch, of which the last teacher's are the largest on most images."""
    noise = np.random.default_rng(step)
    loss_TB = noise.random((3, IMAGES)) + np.array([[0.1], [0.2], [0.4]])
    return torch.tensor(loss_TB, dtype=torch.float32), noise.random((3, IMAGES))


def masked(loss_TB: Tensor, pairs_TB: NDArray[np.bool_] | None) -> Tensor:
    """The losses as a balancer gets them: -inf for pairs that are not computed."""
    return loss_TB if pairs_TB is None else torch.where(torch.tensor(pairs_TB), loss_TB, -torch.inf)


def take_step(found: LazyDropping, step: int) -> tuple[Tensor, NDArray[np.bool_] | None, Tensor]:
    """(coefficients, pairs, losses) of a step of one micro batch."""
    loss_TB, uniform_TB = draws(step)
    pairs_TB = found.choose_pairs(step, uniform_TB)
    given_TB = torch.tensor(uniform_TB if pairs_TB is None else pairs_TB, dtype=torch.float32)
    weight_TB = found(masked(loss_TB, pairs_TB), given_TB)
    found.track()
    return weight_TB, pairs_TB, loss_TB


def test_the_first_step_and_one_of_every_few_are_full() -> None:
    found = lazy()
    full = [take_step(found, step)[1] is None for step in range(1, 10)]
    assert full == [True, False, False, True, False, False, False, True, False]


@pytest.mark.parametrize("divisor", ["expected", "kept"])
def test_coefficients_are_those_of_the_kept_pairs(divisor: str) -> None:
    found = lazy(Loss(divisor=divisor), rate=0.75)
    weight_TB, _, loss_TB = take_step(found, 1)
    eager = Dropping(torch.tensor([1.0, 2, 1]), found.full.drop, divisor)
    assert torch.equal(weight_TB, eager(loss_TB, torch.tensor(draws(1)[1], dtype=torch.float32)))
    weight_TB, pairs_TB, _ = take_step(found, 2)
    want_TB = draws(2)[1] >= 0.75
    want_TB[2] = True  # the largest running loss
    np.testing.assert_array_equal(pairs_TB, want_TB)
    pairs = want_TB.sum() if divisor == "kept" else IMAGES * (1 + 2 * 0.25)
    plain_TB = np.array([[0.75], [1.5], [0.75]]) * want_TB / pairs
    np.testing.assert_allclose(weight_TB, plain_TB, rtol=1e-6)


def test_running_losses_are_means_over_what_is_computed() -> None:
    found, running = lazy(), None
    for step in range(1, 9):
        _, pairs_TB, loss_TB = take_step(found, step)
        counted_TB = np.ones((3, IMAGES), bool) if pairs_TB is None else pairs_TB
        mean = (loss_TB.double().numpy() * counted_TB).sum(1) / counted_TB.sum(1)
        running = mean if running is None else 0.5 * running + 0.5 * mean
        np.testing.assert_allclose(found.running_T, running, rtol=1e-6)
        if pairs_TB is None:
            np.testing.assert_allclose(found.judged_T, running, rtol=1e-6)


def test_a_teacher_without_an_image_keeps_its_running_loss() -> None:
    found = lazy(rate=1.0)
    take_step(found, 1)
    before_T = found.running_T.clone()
    _, pairs_TB, _ = take_step(found, 2)
    assert pairs_TB is not None
    assert not pairs_TB[:2].any()
    assert torch.equal(found.running_T[:2], before_T[:2])
    assert found.running_T[2] != before_T[2]


def test_the_hardest_is_chosen_among_the_teachers_that_see_an_image() -> None:
    found = lazy(rate=1.0)
    take_step(found, 1)
    order_T = found.running_T.argsort(descending=True).tolist()
    _, uniform_TB = draws(2)
    uniform_TB[order_T[0], :4] = -1
    uniform_TB[order_T[1], :2] = -1
    want_TB = np.zeros((3, IMAGES), bool)
    want_TB[order_T[0], 4:] = want_TB[order_T[1], 2:4] = want_TB[order_T[2], :2] = True
    np.testing.assert_array_equal(found.choose_pairs(2, uniform_TB), want_TB)


def test_the_log_has_how_often_another_teacher_was_the_hardest() -> None:
    found = lazy()
    values = []
    for step in range(1, 9):
        loss_TB, uniform_TB = draws(step)
        found.choose_pairs(step, uniform_TB)
        values.append(float(found.metrics(loss_TB)["hardest_other"]))
        other = float((loss_TB.argmax(0) != 2).float().mean())
        take_step(found, step)
        if step in (4, 8):
            assert values[-1] == pytest.approx(other)
            assert 0 < other < 1
    assert np.isnan(values).tolist() == [True, True, True, False, True, True, True, False]


def test_a_restart_goes_on_and_a_skipped_step_changes_nothing() -> None:
    one, two = lazy(), lazy()
    for step in (1, 2):
        take_step(one, step)
    two.choose_pairs(1, draws(1)[1])  # it has read that no loss is known
    two.load_state_dict(one.state_dict())
    assert two.choose_pairs(3, draws(3)[1]) is not None
    before = {name: x.clone() for name, x in two.state_dict().items()}
    loss_TB, uniform_TB = draws(4)
    two.choose_pairs(4, uniform_TB)
    two(loss_TB * float("nan"), torch.tensor(uniform_TB))
    two.track(torch.tensor(False))
    assert all(torch.equal(x, two.state_dict()[name]) for name, x in before.items())
    for step in range(5, 9):
        assert np.array_equal(take_step(one, step)[1], take_step(two, step)[1])
    assert torch.equal(one.running_T, two.running_T)


def test_the_first_step_that_is_taken_is_full() -> None:
    found = lazy()
    loss_TB, uniform_TB = draws(1)
    assert found.choose_pairs(1, uniform_TB) is None
    found(loss_TB * float("nan"), torch.tensor(uniform_TB))
    found.track(torch.tensor(False))
    assert found.choose_pairs(2, draws(2)[1]) is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"balance": Balance(kind="adaloss")}, "false for balance.kind adaloss"),
        ({"loss": Loss(cls="cosine + contrastive")}, "false for the term contrastive"),
    ],
)
def test_what_needs_all_pairs_is_refused(more: dict[str, object], says: str) -> None:
    row = Teacher(name="a", source="timm:x")
    with pytest.raises(ValueError, match=f"drop.lazy must be {says}"):
        Config(teachers=(row,), drop=Drop(lazy=True), **more)


def test_shares_are_those_of_the_draws() -> None:
    """At p = 0.5 and four teachers, of the teachers' FLOPs 0.625 are left."""
    assert Drop(rate=0.5).computed_share(4) == 1
    drop = Drop(rate=0.5, lazy=True, full_every=1_000_000)
    assert drop.computed_share(4) == pytest.approx(0.625, abs=1e-5)
    found, computed = lazy(full_every=5), []
    for step in range(1, 201):
        pairs_TB = take_step(found, step)[1]
        computed.append(1.0 if pairs_TB is None else pairs_TB.mean())
    assert np.mean(computed) == pytest.approx(found.full.drop.computed_share(3), abs=0.01)
