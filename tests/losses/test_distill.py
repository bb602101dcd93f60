"""The loss against the published vectors, and what dropping promises."""

from pathlib import Path

import numpy as np
import parity
import pytest
import torch

from unic_ds.config import Balance, Config, Drop, Loss, Teacher
from unic_ds.losses.balancer import Balancer
from unic_ds.losses.distill import distill_loss, no_gather
from unic_ds.losses.dropping import Dropping
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


@pytest.mark.parametrize(
    "loss",
    [
        *(Loss(), Loss(cls="contrastive", patch="none")),
        *(Loss(cls="dispersion", patch="none"), Loss(cls="relational", patch="none")),
    ],
)
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
    if term == "dispersion":
        return np.arccos((p * t).sum(-1)) ** 2
    if term == "relational":
        return plain_relational(p @ p.T, t @ t.T)
    logits = np.exp(p @ t.T / temperature)
    return -np.log(np.diag(logits) / logits.sum(1))


def plain_relational(of_pred, of_target):
    """The relational term of each image, pair by pair."""
    count, found = len(of_pred), []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        middle = sorted(of_target[i, others])[(count - 2) // 2]
        gaps = []
        for j in others:
            gap = of_target[i, j] - of_pred[i, j]
            gaps.append(max(gap if of_target[i, j] >= middle else -gap, 0) ** 2)
        found.append(sum(gaps) / (count - 1))
    return np.array(found)


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
        ("2 dispersion + 4 relational", "cosine"),
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


def plain_kind(rungs, target, terms):
    """Loss of one kind of token per image, by its formula, and cosine; means over the rungs."""
    images = range(len(target))
    of_rungs = [
        sum(weight * plain_distance(p, target, term, 0.2) for term, weight in terms.items())
        for p in rungs.detach()
    ]
    cosines = [1 - plain_distance(p, target, "cosine", 0.2) for p in rungs.detach()]
    return [np.array([x[i].mean() for i in images]) for x in np.mean([of_rungs, cosines], 1)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("cls", "patch"), [("cosine", "0.9 cosine + 0.1 smooth_l1"), (".3 contrastive + mse", "mse")]
)
def test_an_image_has_the_losses_of_its_kinds_of_token_alone(cls, patch, kernels):
    """Their mean, over the kinds that the teacher has too; for a teacher's computed images."""
    pred, target, uniform_TB = random_batch(6, teachers=3)
    other, _, _ = random_batch(6, teachers=3, seed=9)
    for name, tokens in pred.items():
        rungs = zip(tokens, other[name], strict=True)
        pred[name] = Tokens(*(torch.stack(pair).requires_grad_() for pair in rungs))
    kinds_2B = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1]]).bool()
    computed_TB = torch.stack([torch.tensor([1, 1, 1, 0, 0, 1]).bool(), *kinds_2B])
    for name, computed_B in zip(target, computed_TB, strict=True):
        target[name] = target[name]._replace(computed_B=computed_B)
    both = Loss(cls=cls, patch=patch, temperature=0.2)
    one = {"t1": Loss(cls=cls, patch="none"), "t2": Loss(cls="none", patch=patch)}
    distances = {name: loss.distance for name, loss in one.items()}
    given = {"loss": both, "distances": distances, "balance": Balancer(torch.ones(3))}
    given |= {"ops": KERNELS[kernels], "kinds_2B": kinds_2B}
    found, metrics = distill_loss(pred, target, uniform_TB, **given)
    found.backward()
    total = 0.0
    for name, computed_B in zip(pred, computed_TB, strict=True):
        terms_2, want_6 = distances.get(name, both.distance), [[] for _ in range(6)]
        for k, kind in enumerate(terms_2._fields):
            counted_B = (computed_B & kinds_2B[k]).numpy()
            if not terms_2[k]:
                continue
            loss_B, cosine_B = plain_kind(pred[name][k], target[name].features[k], terms_2[k])
            for i in np.flatnonzero(counted_B):
                want_6[i].append(loss_B[i])
            logged = metrics[f"{name}/{kind}_cosine"].item()
            assert logged == pytest.approx(cosine_B[counted_B].mean(), abs=1e-6)
            moved_B = pred[name][k].grad.flatten(2).abs().amax((0, 2)) > 0
            assert moved_B.tolist() == counted_B.tolist()
        want_B = np.array([np.mean(values) if values else np.nan for values in want_6])
        np.testing.assert_allclose(metrics[f"{name}/image_loss"], want_B, rtol=1e-5)
        total += np.nansum(want_B)
    assert found.item() == pytest.approx(total / computed_TB.numel(), rel=1e-5)


def test_a_kind_of_token_without_images_has_no_distance():
    pred, target, uniform_TB = random_batch(4, teachers=1)
    balance, mask_2B = Balancer(torch.ones(1)), torch.tensor([[False], [True]]).expand(2, 4)
    kinds = {"loss": Loss(), "balance": balance}
    found, metrics = distill_loss(pred, target, uniform_TB, **kinds, kinds_2B=mask_2B)
    alone = {"loss": Loss(cls="none"), "balance": balance}
    want, wanted = distill_loss(pred, target, uniform_TB, **alone)
    assert found.item() == want.item()
    assert metrics["t0/cls_cosine"].isnan() and metrics["t0/cls_smooth_l1"].isnan()
    assert all(torch.equal(metrics[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("term", ["contrastive", "relational"])
def test_other_images_come_from_all_ranks(term):
    """The loss and its gradient are those of one rank with all images."""
    pred, target, uniform_TB = random_batch(8, teachers=1)
    pred["t0"].cls_BC.requires_grad_()
    kinds = {"loss": Loss(cls=term, patch="none"), "balance": Balancer(torch.ones(1))}
    whole, _ = distill_loss(pred, target, uniform_TB, **kinds)
    sides = [target["t0"].features.cls_BC, pred["t0"].cls_BC.detach()]
    shares = []
    for rows in (slice(0, 4), slice(4, 8)):

        def gather(x_BC, rows=rows):
            (all_8C,) = (side_8C for side_8C in sides if torch.equal(side_8C[rows], x_BC))
            return all_8C, rows.start

        parts = part(pred, rows), part(target, rows), uniform_TB[:, rows]
        shares.append(distill_loss(*parts, **kinds, all_gather_fn=gather)[0] / 2)
    assert whole.item() == pytest.approx(sum(shares).item(), rel=1e-6)
    for found in (whole, sum(shares)):
        (grad_BC,) = torch.autograd.grad(found, pred["t0"].cls_BC)
        sides.append(grad_BC)
    torch.testing.assert_close(sides[-1], sides[-2])


def test_an_image_alone_has_no_relations():
    pred, target, uniform_TB = random_batch(1, teachers=1)
    loss = Loss(cls="relational", patch="none")
    found, _ = distill_loss(pred, target, uniform_TB, loss=loss, balance=Balancer(torch.ones(1)))
    assert found.item() == 0


def test_an_angle_has_a_slope_where_it_is_0():
    pred_BC = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    found_B = TERMS["dispersion"](pred_BC, torch.tensor([[1.0, 0.0]] * 3), Context(0.2, no_gather))
    np.testing.assert_allclose(
        found_B.detach(), [0, (np.pi / 4) ** 2, np.pi**2], rtol=1e-6, atol=1e-12
    )
    found_B.sum().backward()
    assert pred_BC.grad.isfinite().all() and not pred_BC.grad[0].any() and pred_BC.grad[1].any()


@pytest.mark.parametrize("kind", ["cls", "patch"])
@pytest.mark.parametrize("term", ["cosine", "mse", "smooth_l1"])
def test_a_weight_scales_the_loss_of_its_kind_of_token_and_of_no_other(kind, term):
    """As `--teachers.NAME.patch_loss "2 cosine"` gives it, with the other teacher's as they are."""
    pred, target, uniform_TB = random_batch(6, teachers=2)
    found = {}
    for weight in (0.5, 1, 2):
        own = {f"{kind}_loss": f"{weight} {term}"}
        rows = (Teacher(name="t0", source="timm:x", **own), Teacher(name="t1", source="timm:x"))
        cfg = Config(teachers=rows, balance=Balance(kind="none"))
        loss = {"loss": cfg.loss, "distances": cfg.distances}
        pair = distill_loss(pred, target, uniform_TB, balance=Balancer(torch.ones(2)), **loss)
        found[weight] = pair[0].item()
    p, t = ((side["t0"] if side is pred else side["t0"].features) for side in (pred, target))
    mean = plain_distance(
        getattr(p, f"{kind}_B{'N' * (kind == 'patch')}C"),
        getattr(t, f"{kind}_B{'N' * (kind == 'patch')}C"),
        term,
        0.2,
    ).mean()
    # Two teachers, and two kinds of token each.
    assert found[2] - found[1] == pytest.approx(mean / 4, rel=1e-4)
    assert found[1] - found[0.5] == pytest.approx(mean / 8, rel=1e-4)


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
