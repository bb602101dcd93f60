"""MGDA: the teachers' gradients at the student's last features, and the weights between them."""

import numpy as np
import pytest
import torch
from host_reads import HostReads
from runs import ROOT

from unic_ds import config
from unic_ds.config import Balance, Config, Loss, Teacher
from unic_ds.config.ds_config import merge
from unic_ds.losses import balance, dispersion
from unic_ds.losses.distill import distill_loss
from unic_ds.losses.mgda import Mgda, min_norm
from unic_ds.models.encoder import residuals
from unic_ds.models.ladder import Head
from unic_ds.models.student import Student
from unic_ds.planning import estimate, trace
from unic_ds.tokens import Target, Tokens
from unic_kernels.ops import KERNELS

WIDTHS = {"a": 12, "b": 20, "c": 8}
DISTANCES = {
    "b": Loss(cls="none", patch="2 cosine").distance,
    "c": Loss(cls="mse", patch="none").distance,
}
IMAGES, PATCHES = 8, 4
EXACT = 1e-12
"""A ridge below what the tests can tell."""
TERMS = "0.5 cosine + contrastive + dispersion + relational"


def gradients(teachers, size, seed=0):
    """Rows of very unequal length that share a direction, so that some face is the answer."""
    draw = torch.Generator().manual_seed(seed)
    row_TM = torch.randn(teachers, size, generator=draw, dtype=torch.float64) + 0.5
    return row_TM * torch.rand(teachers, 1, generator=draw, dtype=torch.float64).exp2() ** 3


def assert_least(weight_T, row_TM):
    """Weights of a convex combination that satisfy the condition of its least norm."""
    assert (weight_T >= 0).all() and weight_T.sum().item() == pytest.approx(1, abs=1e-12)
    sum_M = weight_T @ row_TM
    square = sum_M.square().sum()  # g_t . sum >= |sum|^2 for every t, and = where w_t > 0
    slack_T = row_TM @ sum_M - square
    scale = row_TM.square().sum(1).max()
    assert slack_T.min() > -1e-9 * scale
    assert slack_T[weight_T > 1e-9].abs().max() < 1e-9 * scale


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("teachers", "size"), [(1, 3), (2, 40), (3, 40), (5, 3), (8, 100), (12, 9)]
)
def test_the_weights_give_the_shortest_gradient(teachers, size, seed):
    row_TM = gradients(teachers, size, seed)
    assert_least(min_norm(row_TM @ row_TM.T, EXACT), row_TM)


@pytest.mark.parametrize("seed", range(5))
def test_two_teachers_have_the_closed_form(seed):
    one, two = gradients(2, 6, seed).numpy()
    alpha = np.clip((two - one) @ two / ((one - two) @ (one - two)), 0, 1)
    row_TM = torch.tensor(np.stack([one, two]))
    np.testing.assert_allclose(min_norm(row_TM @ row_TM.T, EXACT), [alpha, 1 - alpha], atol=1e-9)


def test_degenerate_gradients_have_weights_too():
    equal_TT = torch.full((3, 3), 2.0, dtype=torch.float64)
    np.testing.assert_allclose(min_norm(equal_TT), [1 / 3] * 3, atol=1e-3)
    np.testing.assert_allclose(min_norm(torch.zeros_like(equal_TT)), [1 / 3] * 3)
    one_at_rest_TT = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))
    np.testing.assert_allclose(min_norm(one_at_rest_TT, EXACT), [0, 1, 0], atol=1e-9)


def student_of(model, combine, kernels, distances=DISTANCES, recomputed="none"):
    ladder = config.Ladder(rungs="half", width=24, combine=combine)
    heads = {
        name: Head(width, distances.get(name, Loss().distance).kinds)
        for name, width in WIDTHS.items()
    }
    cfg = config.Student(model=model, size=32, activation_checkpointing=recomputed)
    student = Student(cfg, ladder, heads, seed=0, ops=KERNELS[kernels])
    student.keeps_shared = True
    draw = torch.Generator().manual_seed(1)
    for parameter in student.parameters():  # initial ladders give gradients of 1e-3 of these
        if parameter.dim() > 1:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return student


def batch():
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=draw)
    target = {
        name: Tokens(
            torch.randn(IMAGES, width, generator=draw),
            torch.randn(IMAGES, PATCHES, width, generator=draw),
        )
        for name, width in WIDTHS.items()
    }
    return image, target


def loss_of(student, image, target, balancer, kernels="fused", **more):
    pred = student(image)
    return distill_loss(
        pred,
        {name: Target.of(tokens) for name, tokens in target.items()},
        torch.zeros(len(target), len(image)),
        loss=Loss(),
        balance=balancer,
        ops=KERNELS[kernels],
        shared=student.take_shared(),
        **{"distances": DISTANCES} | more,
    )[0]


def plain_gram(student, image, target):
    """Inner products in fp64, by the formulas of the losses, through the whole token sequence."""
    student = student.double()
    states = residuals(
        student.encoder, student.normalise(image, torch.float64), student.ladder.blocks
    )
    pred, root = student.ladder(states), states[-1].patch_BNC._base  # the last block's output
    rows = []
    for name, tokens in pred.items():
        kinds = []
        for terms, p, t in zip(
            DISTANCES.get(name, Loss().distance), tokens, target[name], strict=True
        ):
            parts = {
                "cosine": lambda p, t: 1 - torch.cosine_similarity(p, t, dim=-1),
                "smooth_l1": lambda p, t: torch.nn.functional.smooth_l1_loss(
                    p, t.expand_as(p), reduction="none"
                ).mean(-1),
                "mse": lambda p, t: (p - t).square().mean(-1),
            }
            if terms:
                values = sum(w * parts[term](p, t.double()) for term, w in terms.items())
                leading = (0,) if student.ladder.cfg.combine == "each" else ()
                values = values.mean(leading) if leading else values
                kinds.append(values.reshape(len(image), -1).mean(1))
        loss = torch.stack(kinds).mean(0).sum()
        (grad,) = torch.autograd.grad(loss, root, retain_graph=True)
        rows.append(grad.flatten())
    row_TM = torch.stack(rows)
    return row_TM @ row_TM.T


CASES = [
    *(("test_vit", "sum", "fused"), ("test_vit", "sum", "reference")),
    *(("test_vit2", "sum", "fused"), ("test_vit", "each", "fused")),
]
"""Encoders with and without a CLS token."""


@pytest.mark.parametrize(("model", "combine", "kernels"), CASES)
def test_the_gradients_are_those_of_the_formulas(model, combine, kernels):
    student, (image, target) = student_of(model, combine, kernels), batch()
    found = Mgda(torch.ones(3), 0.9)
    loss_of(student, image, target, found, kernels)
    want_TT = plain_gram(student, image, target)
    scale_T = want_TT.diagonal().sqrt()
    gap_TT = (found.sum_TT - want_TT).abs() / (scale_T[:, None] * scale_T)
    assert gap_TT.max() < 1e-4
    assert found.images.item() == IMAGES


def test_gradients_in_bf16_are_those_of_fp32_to_its_rounding():
    grams = []
    for dtype in (torch.float32, torch.bfloat16):
        student, (image, target) = student_of("test_vit", "sum", "fused").to(dtype), batch()
        sides = {name: Tokens(*(x.to(dtype) for x in tokens)) for name, tokens in target.items()}
        found = Mgda(torch.ones(3), 0.9)
        loss_of(student, image, sides, found)
        grams.append(found.sum_TT)
    scale_T = grams[0].diagonal().sqrt()
    assert ((grams[1] - grams[0]).abs() / (scale_T[:, None] * scale_T)).max() < 2**-5  # 8 bits


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_the_encoder_is_not_run_backward_and_the_gradient_is_the_same(recomputed):
    (image, target), grads, runs = batch(), [], []

    def count_backward(block, given, x_BND):
        x_BND.register_hook(lambda _: runs.append("encoder"))

    for compares in (False, True):
        student = student_of("test_vit", "sum", "fused", recomputed=recomputed)
        student.keeps_shared = compares
        student.encoder.blocks[-1].register_forward_hook(count_backward)
        loss = loss_of(student, image, target, Mgda(torch.ones(3), 0.9))
        assert runs == []
        loss.backward()
        assert runs.pop() == "encoder" and runs == []
        grads.append({name: p.grad for name, p in student.named_parameters()})
        assert student.take_shared() is None  # the graph is not held any longer
    assert all(grad is None or torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_has_the_same_weights_however_it_is_split(parts):
    student, (image, target) = student_of("test_vit", "sum", "fused"), batch()
    found, whole = Mgda(torch.ones(3), 0.9), Mgda(torch.ones(3), 0.9)
    for each, count in ((found, parts), (whole, 1)):
        for rows in torch.arange(IMAGES).chunk(count):
            part = {name: Tokens(*(x[rows] for x in tokens)) for name, tokens in target.items()}
            loss_of(student, image[rows], part, each)
        each.track()
    torch.testing.assert_close(found.gram_TT, whole.gram_TT, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.share_T, whole.share_T, rtol=1e-4, atol=1e-5)
    assert whole.share_T.sum().item() == pytest.approx(3) and whole.share_T.std() > 0.1


def test_images_without_a_kind_of_token_have_the_gradients_of_the_other():
    student, (image, target) = student_of("test_vit", "sum", "fused", {}), batch()
    masked, alone = Mgda(torch.ones(3), 0.9), Mgda(torch.ones(3), 0.9)
    kinds_2B = torch.tensor([[False], [True]]).expand(2, IMAGES)
    loss_of(student, image, target, masked, distances={}, kinds_2B=kinds_2B)
    patch = Loss(cls="none").distance
    loss_of(student, image, target, alone, distances=dict.fromkeys(WIDTHS, patch))
    torch.testing.assert_close(masked.sum_TT, alone.sum_TT, rtol=1e-6, atol=0)
    assert masked.sum_TT.diagonal().min() > 0


@pytest.mark.parametrize("kind", ["adaloss", "famo", "mgda"])
def test_a_step_reads_nothing_back_from_the_device(kind):
    rows = tuple(Teacher(name=name, source="timm:x", cls_loss=TERMS) for name in WIDTHS)
    cfg = Config(teachers=rows, balance=Balance(kind=kind))
    student, (image, target) = student_of("test_vit", "sum", "reference", {}), batch()
    student.keeps_shared = cfg.balance.compares_gradients
    balancer, found = balance.build(cfg), dispersion.build(cfg, WIDTHS)
    roots = {"losses": ROOT / "unic_ds" / "losses", "kernels": ROOT / "kernels"}
    pred, uniform_TB = student(image), torch.zeros(3, IMAGES)
    sides = {name: Target.of(tokens) for name, tokens in target.items()}
    with HostReads(roots) as reads:
        distill_loss(
            pred,
            sides,
            uniform_TB,
            loss=cfg.loss,
            balance=balancer,
            distances=cfg.distances,
            ops=KERNELS["reference"],
            shared=student.take_shared(),
            dispersions=found.by_name(),
            kinds_2B=torch.ones(2, IMAGES, dtype=torch.bool),
        )
        balancer.track(torch.ones((), dtype=torch.bool))
        found.track(torch.ones((), dtype=torch.bool))
    assert reads.of("losses") == {}


def grams(count):
    rows = [gradients(3, 20, seed) for seed in range(count)]
    return [4 * row_TM @ row_TM.T for row_TM in rows]


def test_weights_are_those_of_the_running_inner_products():
    found, running = Mgda(torch.tensor([1.0, 3.0, 0.5]), 0.9), None
    loss_TB = torch.ones(3, 2)
    for sum_TT in grams(6):
        share_T = torch.ones(3) if running is None else 3 * min_norm(running)
        want_TB = (share_T * found.weight_T / 6)[:, None].expand(3, 2)
        torch.testing.assert_close(found(loss_TB, loss_TB), want_TB.float())
        found.compare(sum_TT / 2, 2)
        found.compare(sum_TT / 2, 2)
        found.track()
        mean_TT = sum_TT / 4
        running = mean_TT if running is None else 0.9 * running + 0.1 * mean_TT


def test_a_skipped_step_and_a_restart_change_nothing():
    one, two, loss_TB = Mgda(torch.ones(3), 0.9), Mgda(torch.ones(3), 0.9), torch.ones(3, 2)
    first, second, third = grams(3)
    one.compare(first, 4)
    one.track(torch.tensor(True))
    before = {name: value.clone() for name, value in one.state_dict().items()}
    for gram_TT, taken in ((second * float("nan"), True), (second, False)):
        one.compare(gram_TT, 4)
        one.track(torch.tensor(taken))
        assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())
    two.load_state_dict(before)
    for each in (one, two):
        each.compare(third, 4)
        each.track()
    assert torch.equal(one(loss_TB, loss_TB), two(loss_TB, loss_TB))
    assert not torch.equal(one.share_T, before["share_T"])


def teachers(count):
    return tuple(Teacher(name=f"t{i}", source="timm:x") for i in range(count))


def test_what_mgda_cannot_do_is_refused():
    kind = Balance(kind="mgda")
    with pytest.raises(ValueError, match=r"teachers must be at most 12 if .* is mgda, got 13"):
        Config(teachers=teachers(13), balance=kind)
    cfg = Config(teachers=teachers(12), balance=kind)
    file = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match=r"balance.kind 'mgda' does not go with ZeRO-3.*; use"):
        merge(file, cfg, 1)
    assert balance.build(cfg).compares_gradients == kind.compares_gradients


@pytest.mark.parametrize("projector", ["mlp", "linear"])
def test_the_planner_counts_the_second_backward_of_the_ladder(projector):
    ladder = config.Ladder(rungs="5", width=24, projector=projector)
    rows = tuple(
        Teacher(name=name, source=f"python:small_teacher:{name}") for name in ("narrow", "wide")
    )
    student = config.Student(model="test_vit", size=32)
    flops, peaks = {}, {}
    for kind in ("fixed", "mgda"):
        cfg = Config(teachers=rows, student=student, ladder=ladder, balance=Balance(kind=kind))
        traced = trace.trace(cfg, 2, bf16=False)
        flops[kind], peaks[kind] = estimate.flops_per_image(cfg, traced, 2), traced.step_peak
    assert flops["mgda"]["ladder"] == pytest.approx(5 / 3 * flops["fixed"]["ladder"])
    assert flops["mgda"]["encoder"] == flops["fixed"]["encoder"]
    if projector == "mlp":  # the other's peak is in the encoder's backward
        assert peaks["mgda"] > peaks["fixed"]
