"""PCA maps against a singular value decomposition in fp64, and between pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unic_ds.evaluate import pca_maps
from unic_ds.evaluate.pca_maps import Basis


def planted(images: int = 4, grid: int = 5, width: int = 20) -> tuple[Tensor, Tensor]:
    """Tokens of three strong directions in noise, off the origin; and the directions."""
    g = torch.Generator().manual_seed(3)
    direction_DC = torch.linalg.qr(torch.randn(width, 3, generator=g)).Q.T
    weight_MD = torch.randn(images * grid**2, 3, generator=g) * torch.tensor([9.0, 5.0, 2.0])
    noise_MC = 0.01 * torch.randn(images * grid**2, width, generator=g)
    token_MC = 7 + weight_MD @ direction_DC + noise_MC
    return token_MC.unflatten(0, (images, grid**2)), direction_DC


def turned(basis: Basis, order: list[int], sign: list[float]) -> Basis:
    """The basis in another order and with other signs."""
    sign_D = torch.tensor(sign)
    ends_2D = torch.stack([basis.low_D[order] * sign_D, basis.high_D[order] * sign_D])
    return basis._replace(
        component_DC=basis.component_DC[order] * sign_D[:, None],
        low_D=ends_2D.min(0).values,
        high_D=ends_2D.max(0).values,
        share_D=basis.share_D[order],
    )


def test_planted_components_are_found_in_the_order_of_their_variance() -> None:
    patch_BNC, direction_DC = planted()
    basis = pca_maps.fit(patch_BNC)
    token_MC = patch_BNC.double().flatten(0, 1)
    _, size_K, right_KC = torch.linalg.svd(token_MC - token_MC.mean(0), full_matrices=False)
    cosine_D = (basis.component_DC.double() * right_KC[:3]).sum(1).abs()
    assert cosine_D.tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert torch.linalg.svdvals(basis.component_DC @ direction_DC.T).min() > 0.999
    share_D = size_K.square()[:3] / size_K.square().sum()
    assert basis.share_D.tolist() == pytest.approx(share_D.tolist(), rel=1e-5)
    assert basis.fitted_2.tolist() == [4, 100]
    largest_D = basis.component_DC.gather(1, basis.component_DC.abs().argmax(1, keepdim=True))
    assert (largest_D > 0).all()


@pytest.mark.gpu
def test_random_states_of_a_gpu_stay() -> None:
    states = torch.cuda.get_rng_state()
    pca_maps.fit(planted()[0])
    assert torch.equal(torch.cuda.get_rng_state(), states)


def test_colours_span_the_quantiles_and_the_same_basis_gives_the_same_picture() -> None:
    patch_BNC, _ = planted()
    states = torch.get_rng_state()
    basis, again = pca_maps.fit(patch_BNC), pca_maps.fit(patch_BNC)
    assert torch.equal(torch.get_rng_state(), states)
    assert all(map(torch.equal, basis, again))
    colour_BND = basis.colours(patch_BNC)
    assert (colour_BND.flatten(0, 1).min(0).values == 0).all()
    assert (colour_BND.flatten(0, 1).max(0).values == 1).all()
    outside_BND = (colour_BND == 0) | (colour_BND == 1)
    assert outside_BND.sum((0, 1)).tolist() == [2, 2, 2]  # of 100 tokens, 1 % on either side
    stored = Basis.read(basis.state_dict("dinov2/"), "dinov2/", width=20)
    assert stored and torch.equal(stored.colours(patch_BNC), colour_BND)
    map_BGG3 = pca_maps.to_map(colour_BND)
    assert map_BGG3.shape == (4, 5, 5, 3) and map_BGG3.dtype == torch.uint8
    assert map_BGG3[1, 2, 3].tolist() == (colour_BND[1, 13] * 255).round().tolist()


@pytest.mark.parametrize("order, sign", [([0, 1, 2], [-1.0, 1, -1]), ([2, 0, 1], [1.0, -1, -1])])
def test_order_and_signs_are_those_of_the_earlier_picture(
    order: list[int], sign: list[float]
) -> None:
    patch_BNC, _ = planted()
    basis = pca_maps.fit(patch_BNC)
    earlier = turned(basis, order, sign)
    aligned = pca_maps.aligned(basis, earlier, patch_BNC)
    for ours, theirs in zip(aligned, earlier, strict=True):
        assert torch.equal(ours, theirs)
    # Features of training move little: those of the next picture have nearly the same colours.
    moved_BNC = patch_BNC + 0.05 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    following = pca_maps.aligned(pca_maps.fit(moved_BNC), earlier, moved_BNC)
    gap_BND = following.colours(moved_BNC) - earlier.colours(patch_BNC)
    assert gap_BND.abs().max() < 0.01


def test_a_stored_basis_of_another_width_or_that_is_broken_is_not_used() -> None:
    state = pca_maps.fit(planted()[0]).state_dict("a/")
    assert Basis.read(state, "a/", width=20)
    assert Basis.read(state, "a/", width=21) is None
    assert Basis.read(state, "b/", width=20) is None
    state["a/low_D"] = torch.full((3,), torch.nan)
    assert Basis.read(state, "a/", width=20) is None


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 4, 2), (2, 4, 8)])
def test_few_or_equal_tokens_have_colours_too(shape: tuple[int, int, int]) -> None:
    for patch_BNC in (
        torch.ones(shape),
        torch.arange(float(torch.Size(shape).numel())).view(shape),
    ):
        colour_BND = pca_maps.fit(patch_BNC).colours(patch_BNC)
        assert colour_BND.shape == (*shape[:2], 3)
        assert colour_BND.isfinite().all()


def test_many_tokens_are_fitted_by_a_part_of_them() -> None:
    patch_BNC = planted(images=8, grid=60)[0]
    basis = pca_maps.fit(patch_BNC)
    token_MC = patch_BNC.double().flatten(0, 1)
    right_KC = torch.linalg.svd(token_MC - token_MC.mean(0), full_matrices=False).Vh
    cosine_D = (basis.component_DC.double() * right_KC[:3]).sum(1).abs()
    assert cosine_D.tolist() == pytest.approx([1, 1, 1], abs=1e-3)
    assert basis.fitted_2.tolist() == [8, 14400]


def test_tokens_that_form_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="6 patch tokens do not form a square"):
        pca_maps.to_map(torch.zeros(1, 6, 3))
