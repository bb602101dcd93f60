"""The angular dispersion of teachers' CLS targets, and the term that divides by it."""

import numpy as np
import pytest
import torch

from unic_ds.config import Config, Loss, Teacher
from unic_ds.losses import dispersion
from unic_ds.losses.balancer import Balancer
from unic_ds.losses.dispersion import Dispersion
from unic_ds.losses.distill import distill_loss
from unic_ds.tokens import Target, Tokens

YES, NO = torch.tensor(True), torch.tensor(False)


def cone(images, spread, seed=0):
    """Targets around one direction, of very unequal length."""
    draw = torch.Generator().manual_seed(seed)
    target_BC = torch.tensor([3.0, 0, 0, 0, 0]) + spread * torch.randn(images, 5, generator=draw)
    return target_BC * torch.rand(images, 1, generator=draw).exp()


def angles(y, direction):
    """Angles in fp64, by the cosine."""
    y = y / np.linalg.norm(y, axis=1, keepdims=True)
    return np.arccos(y @ direction / np.linalg.norm(direction))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_dispersion_is_its_formula_however_a_step_is_split(parts):
    found, total, squares = Dispersion(5), np.zeros(5), []
    for step in range(6):
        target_BC = cone(8, 0.5, seed=step)
        divisors = [found(part_BC) for part_BC in target_BC.chunk(parts)]
        want = np.mean(squares) if squares else 1
        assert [float(x) for x in divisors] == pytest.approx([want] * parts, rel=1e-5)
        y = target_BC.double().numpy()
        squares += [] if step == 0 else list(angles(y, total) ** 2)
        total += (y / np.linalg.norm(y, axis=1, keepdims=True)).sum(0)
        found.track(YES)
    many = np.concatenate([cone(8, 0.5, seed=step) for step in range(6)]).astype(float)
    unit = many / np.linalg.norm(many, axis=1, keepdims=True)
    whole = np.mean(angles(many, unit.mean(0)) ** 2)  # with the mean of all images at once
    assert float(found(cone(8, 0.5))) == pytest.approx(whole, rel=0.2)


def test_a_skipped_step_and_a_restart_change_nothing():
    one, two = Dispersion(5), Dispersion(5)
    for step in range(3):
        one(cone(8, 0.5, seed=step))
        one.track(YES)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    for target_BC, taken in ((cone(8, 2.0, seed=9), NO), (cone(8, 0.5) * float("nan"), YES)):
        one(target_BC)
        one.track(taken)
        assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())
    two.load_state_dict(before)
    for each in (one, two):
        each(cone(8, 0.5, seed=4))
        each.track(YES)
    assert torch.equal(one(cone(8, 0.5)), two(cone(8, 0.5)))
    assert not torch.equal(one.direction_C, before["direction_C"])


def test_a_narrow_teacher_has_the_loss_of_a_wide_one():
    """Predictions that miss by the same fraction of each teacher's cone."""
    spreads = {"narrow": 0.05, "wide": 0.5}
    rows = tuple(Teacher(name=name, source="timm:x") for name in spreads)
    cfg = Config(teachers=rows, loss=Loss(cls="dispersion", patch="none"))
    found, losses = dispersion.build(cfg, dict.fromkeys(spreads, 5)), []
    for step in range(12):
        target = {name: cone(64, spread, seed=step) for name, spread in spreads.items()}
        mean_C = torch.tensor([3.0, 0, 0, 0, 0]).expand(64, 5)  # the best guess without an image
        nothing = torch.empty(0)
        _, metrics = distill_loss(
            {name: Tokens(mean_C, nothing) for name in spreads},
            {name: Target.of(Tokens(target_BC, nothing)) for name, target_BC in target.items()},
            torch.zeros(2, 64),
            loss=cfg.loss,
            balance=Balancer(torch.ones(2)),
            dispersions=found.by_name(),
        )
        found.track(YES)
        losses.append([metrics[f"{name}/image_loss"].mean().item() for name in spreads])
    np.testing.assert_allclose(np.mean(losses[2:], 0), 1, rtol=0.15)
    assert losses[0][1] > 50 * losses[0][0]  # before a dispersion is known


def test_teachers_without_the_term_have_no_state():
    rows = (
        Teacher(name="a", source="timm:x", cls_loss="0.5 dispersion + cosine"),
        Teacher(name="b", source="timm:x"),
    )
    found = dispersion.build(Config(teachers=rows), {"a": 5, "b": 6})
    assert list(found.by_name()) == ["a"]
    assert {name.split(".")[1] for name in found.state_dict()} == {"a"}
    assert not dispersion.build(Config(teachers=rows[1:]), {"b": 6}).state_dict()


@pytest.mark.parametrize("term", ["dispersion", "relational"])
def test_terms_of_cls_tokens_are_refused_for_patches(term):
    with pytest.raises(ValueError, match=f"loss.patch must have no {term}, which is a term of CLS"):
        Loss(patch=f"cosine + {term}")
