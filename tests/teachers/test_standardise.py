"""Standardisation against the method's vectors, and against the ways a batch can be split."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unic_ds import config
from unic_ds.teachers.standardise import Standardiser, merge
from unic_ds.tokens import Tokens
from unic_kernels.moments import moments

PAPER = config.Standardise(std_floor=0.0, target_clamp=0.0)
VECTORS = Path(__file__).parents[1] / "vectors" / "standardise.npz"


def tokens_of(seed: int, images: int = 12, patches: int = 5, width: int = 6) -> Tokens:
    """Tokens whose channels have different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    scale_C = torch.linspace(0.1, 30, width)
    cls_BC = torch.randn(images, width, generator=generator) * scale_C + 3 * scale_C
    patch_BNC = torch.randn(images, patches, width, generator=generator) * scale_C - scale_C
    return Tokens(cls_BC, patch_BNC)


def part(tokens: Tokens, rows: slice) -> Tokens:
    return Tokens(tokens.cls_BC[rows], tokens.patch_BNC[rows])


def step(norm: Standardiser, batches: list[Tokens], momentum: float) -> list[Tokens]:
    """One optimiser step of one rank, by the functions training uses."""
    targets = []
    for tokens in batches:
        targets.append(norm(tokens).standardised())
        norm.observe(tokens)
    norm.track(norm.moments()[None], momentum)
    return targets


def gap(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).abs() / truth.abs().clamp(min=1)).max().item()


def test_equals_the_published_vectors():
    assert parity.over(parity.check_standardise(VECTORS)) == []


@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 11], list(range(1, 12))])
def test_micro_batches_do_not_matter(cuts):
    tokens, bounds = tokens_of(0), [0, *cuts, 12]
    whole, split = Standardiser(6, PAPER), Standardiser(6, PAPER)
    step(whole, [tokens], 0.7)
    step(split, [part(tokens, slice(a, b)) for a, b in pairwise(bounds)], 0.7)
    assert gap(split.mean_2C, whole.mean_2C) < 1e-6
    assert gap(split.std_2C, whole.std_2C) < 1e-6


def test_ranks_do_not_matter():
    tokens = tokens_of(1)
    whole, ranks = Standardiser(6, PAPER), [Standardiser(6, PAPER) for _ in range(3)]
    step(whole, [tokens], 0.5)
    for norm, rows in zip(ranks, (slice(0, 5), slice(5, 6), slice(6, 12)), strict=True):
        norm.observe(part(tokens, rows))
    gathered_PS2C = torch.stack([norm.moments() for norm in ranks])
    for norm in ranks:
        norm.track(gathered_PS2C, 0.5)
        assert torch.equal(norm.mean_2C, ranks[0].mean_2C)
        assert torch.equal(norm.std_2C, ranks[0].std_2C)
        assert gap(norm.mean_2C, whole.mean_2C) < 1e-6
        assert gap(norm.std_2C, whole.std_2C) < 1e-6


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    offset=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**31 - 1),
)
def test_merge_is_the_union(counts, offset, seed):
    x_RC = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed)) + offset
    parts = [moments(x)[:, None] for x in x_RC.split(counts)]
    found_S2C = merge(torch.stack(parts))
    truth_RC = x_RC.double()
    assert torch.equal(found_S2C[0, 0], torch.full((3,), float(len(x_RC)), dtype=torch.float64))
    torch.testing.assert_close(found_S2C[1, 0], truth_RC.mean(0), rtol=1e-6, atol=1e-6)
    spread_C = (truth_RC - truth_RC.mean(0)).square().sum(0)
    torch.testing.assert_close(found_S2C[2, 0], spread_C, rtol=1e-5, atol=1e-5)


def test_merge_order_and_empty_parts_do_not_matter():
    parts = [moments(tokens_of(seed).cls_BC)[:, None] for seed in range(3)]
    empty = torch.zeros_like(parts[0])
    forth, back = merge(torch.stack(parts)), merge(torch.stack([empty, *reversed(parts), empty]))
    torch.testing.assert_close(forth, back, rtol=1e-12, atol=1e-12)


def test_dead_channel_is_floored_and_clamped():
    cfg = config.Standardise(std_floor=0.1, target_clamp=10.0)
    tokens = tokens_of(2)
    tokens.cls_BC[:, 4] = 0.25
    tokens.patch_BNC[..., 4] = 0.25
    norm, bare = Standardiser(6, cfg), Standardiser(6, PAPER)
    for each in (norm, bare):
        step(each, [tokens], 1.0)
    awake = Tokens(tokens.cls_BC.clone(), tokens.patch_BNC.clone())
    awake.cls_BC[0, 4] += 1
    floor = 0.1 * norm.std_2C[0].median().item()
    assert norm(awake).standardised().cls_BC[0, 4].item() == pytest.approx(1 / floor, rel=1e-3)
    assert bare(awake).standardised().cls_BC[0, 4].item() > 1e4
    awake.cls_BC[0, 4] += 1e6
    assert norm(awake).standardised().cls_BC[0, 4].item() == 10.0


def test_first_targets_are_the_features():
    tokens = tokens_of(3)
    target = Standardiser(6, PAPER)(tokens).standardised()
    assert gap(target.patch_BNC, tokens.patch_BNC) < 2e-6


def test_zero_momentum_changes_nothing():
    norm = Standardiser(6, PAPER)
    step(norm, [tokens_of(4)], 1.0)
    mean_2C, std_2C = norm.mean_2C.clone(), norm.std_2C.clone()
    step(norm, [tokens_of(5)], 0.0)
    assert torch.equal(norm.mean_2C, mean_2C)
    assert torch.equal(norm.std_2C, std_2C)


def test_non_finite_features_leave_the_statistics_alone():
    norm = Standardiser(6, PAPER)
    step(norm, [tokens_of(4)], 1.0)
    mean_2C = norm.mean_2C.clone()
    broken = tokens_of(5)
    broken.cls_BC[3, 2] = torch.nan
    (target,) = step(norm, [broken], 0.5)
    assert torch.isnan(target.cls_BC[3, 2])  # the loss must see it, and skip its step
    assert torch.equal(norm.mean_2C, mean_2C)
    step(norm, [tokens_of(6)], 0.5)
    assert torch.isfinite(norm.mean_2C).all()
    assert not torch.equal(norm.mean_2C, mean_2C)


def test_bf16_features_give_fp32_targets():
    half = Tokens(*(x.bfloat16() for x in tokens_of(7)))
    norm = Standardiser(6, PAPER)
    step(norm, [half], 1.0)
    target = norm(half).standardised()
    assert target.cls_BC.dtype == target.patch_BNC.dtype == torch.float32
    assert target.patch_BNC.flatten(0, 1).mean(0).abs().max() < 1e-5


def test_off_gives_raw_features():
    norm = Standardiser(6, config.Standardise(on=False))
    tokens = tokens_of(8)
    step(norm, [tokens], 1.0)
    assert torch.equal(norm(tokens).standardised().cls_BC, tokens.cls_BC)
    assert torch.equal(norm.std_2C, torch.ones(2, 6))


def test_state_survives(tmp_path):
    norm, fresh = Standardiser(6, PAPER), Standardiser(6, PAPER)
    step(norm, [tokens_of(9)], 1.0)
    torch.save(norm.state_dict(), tmp_path / "norm.pt")
    fresh.load_state_dict(torch.load(tmp_path / "norm.pt", weights_only=True))
    for each in (norm, fresh):
        step(each, [tokens_of(10)], 0.3)
    assert torch.equal(norm.mean_2C, fresh.mean_2C)
    assert torch.equal(norm.std_2C, fresh.std_2C)
    assert set(norm.state_dict()) == {"mean_2C", "std_2C"}


def test_fitted_statistics_are_those_of_all_batches():
    tokens, norm = tokens_of(11), Standardiser(6, config.Standardise(fit_steps=3))
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        norm.observe(part(tokens, rows))
    norm.fit(norm.moments()[None], lambda share: share)
    for kind, x_C in enumerate(tokens):
        x_NC = x_C.reshape(-1, 6).double().numpy()
        np.testing.assert_allclose(norm.mean_2C[kind], x_NC.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(norm.std_2C[kind], x_NC.std(0, ddof=1) + 1e-6, rtol=1e-6)
    assert norm.moments().abs().sum() == 0


def test_non_finite_features_cannot_be_fitted():
    norm, broken = Standardiser(6, PAPER), tokens_of(12)
    broken.patch_BNC[1, 2, 3] = torch.nan
    norm.observe(broken)
    with pytest.raises(ValueError, match="not finite"):
        norm.fit(norm.moments()[None], lambda share: share)


@pytest.mark.parametrize("floor", [0.0, 2.0])
def test_a_target_is_an_affine_map_of_its_features(floor):
    norm, tokens = (
        Standardiser(6, config.Standardise(std_floor=floor, target_clamp=0.0)),
        tokens_of(13),
    )
    step(norm, [tokens], 1.0)
    target = norm(tokens).standardised()
    for kind, x_C in enumerate(tokens):
        assert gap(target[kind] * norm.divisor()[kind] + norm.mean_2C[kind], x_C) < 1e-5


def test_either_running_or_fitted_or_off():
    running, fitted = config.Standardise(), config.Standardise(fit_steps=2)
    off = config.Standardise(fit_steps=2, on=False)
    assert [(c.running, c.fitted) for c in (running, fitted, off)] == [
        (True, False),
        (False, True),
        (False, False),
    ]


@pytest.mark.parametrize("cfg", [PAPER, config.Standardise(), config.Standardise(on=False)])
def test_undoing_it_gives_the_features(cfg: config.Standardise) -> None:
    norm = Standardiser(6, cfg)
    step(norm, [tokens_of(0)], 1.0)
    features = tokens_of(1)
    for value, truth in zip(norm.undo(norm(features).standardised()), features, strict=True):
        assert gap(value, truth) < 1e-5
    empty = torch.empty(0)
    assert norm.undo(Tokens(features.cls_BC, empty)).patch_BNC.shape == (0,)
