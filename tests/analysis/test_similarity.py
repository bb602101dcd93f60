"""CKA, mutual neighbours and leave-one-out kNN against plain constructions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from unic_ds.analysis import leave_one_out, similarity


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def textbook_cka(x_NC: Tensor, y_ND: Tensor) -> float:
    """Song et al. (JMLR 13, 2012), equation 5, by kernels of all pairs of images."""

    def hsic(k_NN: Tensor, l_NN: Tensor) -> Tensor:
        n = len(k_NN)
        k_NN, l_NN = (x_NN - x_NN.diagonal().diag() for x_NN in (k_NN, l_NN))
        total = (k_NN @ l_NN).trace() - 2 / (n - 2) * (k_NN @ l_NN).sum()
        return (total + k_NN.sum() * l_NN.sum() / ((n - 1) * (n - 2))) / (n * (n - 3))

    k_NN, l_NN = (z_NC.double() @ z_NC.double().T for z_NC in (x_NC, y_ND))
    return float(hsic(k_NN, l_NN) / (hsic(k_NN, k_NN) * hsic(l_NN, l_NN)).sqrt())


def test_cka_is_that_of_the_kernels_also_for_other_widths() -> None:
    x_NC = noise(50, 12) + 3
    y_ND = torch.cat([x_NC[:, :4], noise(50, 3, seed=1)], 1)
    found = similarity.linear_cka({"x": x_NC, "y": y_ND})
    assert found["x", "y"] == pytest.approx(textbook_cka(x_NC, y_ND), abs=1e-5)


def test_cka_of_a_rotated_copy_is_1_and_of_noise_about_0() -> None:
    x_NC = noise(2000, 20) * torch.linspace(0.1, 3, 20)
    turn_CC = torch.linalg.qr(noise(20, 20, seed=1)).Q
    found = similarity.linear_cka(
        {"x": x_NC, "turned": 5 * x_NC @ turn_CC - 7, "noise": noise(2000, 30, seed=2)}
    )
    assert found["x", "turned"] == pytest.approx(1, abs=1e-5)
    assert abs(found["x", "noise"]) < 0.02 and abs(found["turned", "noise"]) < 0.02


def test_neighbours_are_the_nearest_others_whatever_the_blocks() -> None:
    x_NC = noise(60, 8)
    unit_NC = (x_NC / x_NC.norm(dim=1, keepdim=True)).double().numpy()
    cosine_NN = unit_NC @ unit_NC.T
    np.fill_diagonal(cosine_NN, -2)
    want_NK = np.argsort(-cosine_NN, 1)[:, :10]
    for block in (similarity.BLOCK, 60 * 7):
        found = similarity.nearest_others(x_NC, block=block)
        assert found.label_QK.tolist() == want_NK.tolist()


def test_mutual_neighbours_are_the_shared_part() -> None:
    x_NC = noise(40, 6)
    near = similarity.nearest_others(x_NC)
    assert similarity.mutual_neighbours(near, similarity.nearest_others(2 * x_NC)) == 1
    other = near._replace(label_QK=near.label_QK.flip(1).clone())
    other.label_QK[:, :3] = 99  # three of ten are replaced, and the order does not matter
    assert similarity.mutual_neighbours(near, other) == pytest.approx(0.7)
    independent = (
        similarity.nearest_others(noise(1500, 16)),
        similarity.nearest_others(noise(1500, 16, seed=1)),
    )
    assert similarity.mutual_neighbours(*independent) == pytest.approx(10 / 1499, abs=2e-3)


def test_each_image_is_judged_by_the_others_alone() -> None:
    """Two directions of six images each; an image with the other label is never found right."""
    x_NC = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6) + 0.01 * noise(12, 2)
    label_N = torch.tensor([0] * 6 + [1] * 5 + [0])
    hit_N = leave_one_out.hits(x_NC, label_N, k=3)
    assert hit_N.tolist() == [True] * 11 + [False]
    rows = leave_one_out.by_class({"good": hit_N, "bad": ~hit_N}, label_N, ("zero", "one"))
    assert [(row.name, row.images) for row in rows] == [("one", 5), ("zero", 7)]
    assert rows[0].accuracy == {"good": 100.0, "bad": 0.0} and rows[0].best == ["good"]
    assert rows[1].spread == pytest.approx(100 * (6 - 1) / 7)


def test_a_class_of_one_image_and_images_without_a_class_are_not_judged() -> None:
    kept_N = leave_one_out.judged(torch.tensor([2, -1, 0, 2, 1, 0, -1]))
    assert kept_N.tolist() == [True, False, True, True, False, True, False]


def test_each_model_counts_as_much_in_a_joint_cosine() -> None:
    wide, small = 100 * noise(30, 50) + 4, 0.01 * noise(30, 2, seed=1)
    joined_NC = leave_one_out.side_by_side({"wide": wide, "small": small})
    parts = joined_NC[:, :50], joined_NC[:, 50:]
    assert [float(x_NC.square().sum(1).mean()) for x_NC in parts] == pytest.approx([1, 1])
