"""The loss against the published vectors, and what dropping promises."""

from pathlib import Path

import parity
import pytest
import torch

from unic_ds.config import Drop, Loss
from unic_ds.loss import coefficients, distill_loss, image_loss, keep_teachers
from unic_ds.tokens import Tokens

VECTORS = Path(__file__).parent / "data" / "loss.npz"


def test_equals_the_published_vectors():
    assert parity.over(parity.check_loss(VECTORS)) == []


def random_batch(images, teachers=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def side():
        return {
            f"t{i}": Tokens(
                torch.randn(images, 6 + i, generator=g), torch.randn(images, 4, 6 + i, generator=g)
            )
            for i in range(teachers)
        }

    return side(), side(), torch.rand(teachers, images, generator=g)


def part(tokens, rows):
    return {n: Tokens(t.cls_BC[rows], t.patch_BNC[rows]) for n, t in tokens.items()}


def test_expected_divisor_does_not_see_how_a_batch_is_split():
    pred, target, uniform_TB = random_batch(8)
    kinds = {"loss": Loss(), "drop": Drop(rate=0.5)}
    whole, metrics = distill_loss(pred, target, uniform_TB, **kinds)
    assert metrics["loss"].item() == whole.item()
    halves = [
        distill_loss(part(pred, r), part(target, r), uniform_TB[:, r], **kinds)[0]
        for r in (slice(0, 4), slice(4, 8))
    ]
    assert whole.item() == pytest.approx((halves[0].item() + halves[1].item()) / 2, rel=1e-6)


def test_expected_divisor_is_the_mean_of_kept():
    loss_TB = torch.rand(4, 20_000, generator=torch.Generator().manual_seed(1))
    uniform_TB = torch.rand(4, 20_000, generator=torch.Generator().manual_seed(2))
    for drop in (
        Drop(rate=0.5),
        Drop(rate=0.25),
        Drop(rate=1.0),
        Drop(rate=0.5, keep_hardest=False),
    ):
        keep_TB = keep_teachers(loss_TB, uniform_TB, drop)
        total = coefficients(keep_TB, Loss(), drop).sum().item()
        assert total == pytest.approx(1, abs=0.02), drop


def test_hardest_teacher_is_always_kept_and_alone_at_rate_1():
    loss_TB = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    keep_TB = keep_teachers(loss_TB, torch.full((2, 2), 0.999999), Drop(rate=1.0))
    assert keep_TB.tolist() == [[False, True], [True, False]]


def test_step_unit_gives_one_mask():
    loss_TB = torch.tensor([[1.0, 5.0, 1.0], [3.0, 2.0, 3.0]])
    keep_TB = keep_teachers(
        loss_TB, torch.tensor([[0.1], [0.1]]).expand(2, 3), Drop(rate=0.5, unit="step")
    )
    assert keep_TB.tolist() == [[False] * 3, [True] * 3]


def test_each_averages_the_rungs():
    pred, target, _ = random_batch(5, teachers=1)
    other, _, _ = random_batch(5, teachers=1, seed=9)
    both = Tokens(*(torch.stack([a, b]) for a, b in zip(pred["t0"], other["t0"], strict=True)))
    apart = [image_loss(p["t0"], target["t0"], Loss())[0] for p in (pred, other)]
    torch.testing.assert_close(image_loss(both, target["t0"], Loss())[0], (apart[0] + apart[1]) / 2)


def test_mse_adds_the_mean_squared_error():
    pred, target, _ = random_batch(5, teachers=1)
    plain = image_loss(pred["t0"], target["t0"], Loss())[0]
    more = image_loss(pred["t0"], target["t0"], Loss(mse=2.0))[0]
    cls, patch = ((p - t).square().mean(-1) for p, t in zip(pred["t0"], target["t0"], strict=True))
    torch.testing.assert_close(more - plain, 2 * (cls + patch.mean(1)) / 2)
