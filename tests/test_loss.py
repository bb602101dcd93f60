"""The loss against the published vectors, and what dropping promises."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unic_ds.balance import Balancer, Dropping
from unic_ds.config import Drop, Loss
from unic_ds.loss import distill_loss, image_loss
from unic_ds.tokens import Tokens

VECTORS = np.load(Path(__file__).parent / "data" / "loss.npz", allow_pickle=False)
BOTH = Loss().distance


def case(number):
    """(teachers, pred and target Tokens by teacher, value by key) of one vector case."""
    take = {k.split("_", 1)[1]: VECTORS[k] for k in VECTORS.files if k.startswith(f"case{number}_")}
    names = [str(n) for n in take["teachers"]]

    def tokens(side, name):
        parts = (torch.from_numpy(take[f"{side}_{name}_{kind}"]) for kind in ("cls", "patch"))
        return Tokens(*(p.clone().requires_grad_(side == "pred") for p in parts))

    pred, target = ({n: tokens(side, n) for n in names} for side in ("pred", "target"))
    return names, pred, target, take


@pytest.mark.parametrize("number", range(5))
def test_equals_the_published_vectors(number):
    names, pred, target, take = case(number)
    dropping = Dropping(torch.ones(len(names)), Drop(rate=float(take["drop_prob"])), "kept")
    uniform_TB = torch.from_numpy(take["uniform_TB"])
    loss_TB = torch.stack([image_loss(pred[n], target[n], BOTH)[0] for n in names])
    torch.testing.assert_close(loss_TB, torch.from_numpy(take["loss_TB"]), rtol=1e-5, atol=1e-6)
    weight_TB = dropping(loss_TB, uniform_TB)
    assert weight_TB.sum(1).tolist() == pytest.approx(take["coeff_T"].tolist(), rel=1e-5)

    loss, metrics = distill_loss(pred, target, uniform_TB, loss=Loss(), balance=dropping)
    assert loss.item() == pytest.approx(float(take["loss"]), rel=1e-5)
    assert metrics["loss"].item() == loss.item()
    loss.backward()
    for name in names:
        for kind, tensor in zip(("cls", "patch"), pred[name], strict=True):
            want = torch.from_numpy(take[f"grad_{name}_{kind}"])
            got = tensor.grad if tensor.grad is not None else torch.zeros_like(want)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


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


def test_how_a_batch_is_split_does_not_matter():
    pred, target, uniform_TB = random_batch(8)
    kinds = {"loss": Loss(), "balance": Dropping(torch.ones(3), Drop(rate=0.5), "expected")}
    whole, _ = distill_loss(pred, target, uniform_TB, **kinds)
    halves = [
        distill_loss(part(pred, r), part(target, r), uniform_TB[:, r], **kinds)[0]
        for r in (slice(0, 4), slice(4, 8))
    ]
    assert whole.item() == pytest.approx((halves[0].item() + halves[1].item()) / 2, rel=1e-6)


def test_each_averages_the_rungs():
    pred, target, _ = random_batch(5, teachers=1)
    other, _, _ = random_batch(5, teachers=1, seed=9)
    both = Tokens(*(torch.stack([a, b]) for a, b in zip(pred["t0"], other["t0"], strict=True)))
    apart = [image_loss(p["t0"], target["t0"], BOTH)[0] for p in (pred, other)]
    torch.testing.assert_close(image_loss(both, target["t0"], BOTH)[0], (apart[0] + apart[1]) / 2)


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
def test_a_formula_means_what_it_says(cls, patch):
    loss = Loss(cls=cls, patch=patch, temperature=0.2)
    pred, target, uniform_TB = random_batch(6, teachers=2)
    found, metrics = distill_loss(
        pred, target, uniform_TB, loss=loss, balance=Balancer(torch.ones(2))
    )
    want = []
    for name in pred:
        kinds = []
        for terms, p, t in zip(loss.distance, pred[name], target[name], strict=True):
            parts = [w * plain_distance(p, t, term, 0.2) for term, w in terms.items()]
            if parts:
                kinds.append(sum(parts).reshape(6, -1).mean(1))
        want.append(np.mean(kinds))
    assert found.item() == pytest.approx(np.mean(want), rel=1e-5)
    assert any("cls" in key for key in metrics) == (cls != "none")


def test_negatives_come_from_everyone():
    pred, target, uniform_TB = random_batch(8, teachers=1)
    kinds = {"loss": Loss(cls="contrastive", patch="none"), "balance": Balancer(torch.ones(1))}
    whole, _ = distill_loss(pred, target, uniform_TB, **kinds)
    all_8C = target["t0"].cls_BC
    shares = [
        distill_loss(
            part(pred, rows),
            part(target, rows),
            uniform_TB[:, rows],
            **kinds,
            everyone=lambda _, rows=rows: (all_8C, rows.start),
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
