"""Network utility: principal components and pruned weights against their definitions."""

from __future__ import annotations

from dataclasses import replace

import torch
from memory_sets import MemoryImages, columns_model, scores_of
from planted_classes import planted
from sklearn.decomposition import PCA
from torch import Tensor, nn

from unic_ds.evaluate.features import Model, Outputs
from unic_ds.evaluate.utility import PrincipalAxes, pruned_copy

CPU = torch.device("cpu")


def test_axes_are_scikit_learn_s() -> None:
    rows = planted(200, 50, 12, 3, gap=3)
    axes = PrincipalAxes.of(rows.train_NC + 5, CPU)
    found_ND = axes.project(rows.val_NC + 5, 12)
    oracle = PCA(12, svd_solver="full").fit(rows.train_NC.double() + 5)
    expected_ND = torch.from_numpy(oracle.transform(rows.val_NC.double() + 5))
    assert torch.allclose(found_ND.double().abs(), expected_ND.abs(), atol=1e-4)
    assert torch.equal(axes.project(rows.val_NC + 5, 4), found_ND[:, :4])


def test_an_axis_without_variance_is_zero() -> None:
    g = torch.Generator().manual_seed(0)
    flat_NC = torch.randn(50, 3, generator=g) @ torch.randn(3, 10, generator=g)
    axes_CD = PrincipalAxes.of(flat_NC, CPU).axes_CD
    assert torch.allclose(axes_CD.norm(dim=0), torch.tensor([1.0] * 3 + [0] * 7).double())
    assert PrincipalAxes.of(flat_NC[:6], CPU).count == 5


def test_fewer_dimensions_lose_what_lies_beyond_them() -> None:
    """12 directions tell 13 classes; the widest 12 of 24 channels are noise."""
    g = torch.Generator().manual_seed(0)
    label_N = torch.arange(780) % 13
    class_NC = torch.linalg.qr(torch.randn(13, 12, generator=g)).Q[label_N]
    noise_NC = 20 * torch.randn(780, 12, generator=g)
    images = MemoryImages(torch.cat([class_NC, noise_NC], 1), label_N)
    models = [
        columns_model("classes", slice(12)),
        columns_model("both"),
        columns_model("one", slice(1)),
    ]
    scores = scores_of("utility", models, {"train": images, "val": images})
    value = {(s.model, s.name.removeprefix("utility ")): s.value for s in scores}
    assert value["both", "unchanged"] == value["both", "PCA 24"] == 100
    assert value["both", "PCA 12"] < 35 and value["both", "PCA 6"] < 35
    assert value["classes", "unchanged"] == value["classes", "PCA 12"] == 100
    assert [name for model, name in value if model == "one"] == ["unchanged"]
    (twelve,) = (s for s in scores if (s.model, s.name) == ("both", "utility PCA 12"))
    assert twelve.protocol.startswith("utility PCA 12: linear softmax L2")


class Network(nn.Module):
    """Linear layers, a layer of torch's attention, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 40)
        self.attention = nn.MultiheadAttention(40, 2)
        self.norm = nn.LayerNorm(40)
        self.last = nn.Linear(40, 16)

    def forward(self, x_BC: Tensor) -> Tensor:
        """Outputs (B, 16)."""
        return self.last(self.first(x_BC))


def test_the_smallest_weights_of_each_layer_become_zero() -> None:
    torch.manual_seed(0)
    network = Network()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    pruned = pruned_copy(network, 0.3).state_dict()
    assert list(pruned) == list(before)
    matrices = {name for name, weight in before.items() if weight.ndim == 2}
    assert len(matrices) == 4
    for name, weight in before.items():
        assert torch.equal(network.state_dict()[name], weight)
        kept = pruned[name] != 0
        if name in matrices:
            assert int((~kept).sum()) == round(0.3 * weight.numel())
            assert weight[~kept].abs().max() <= weight[kept].abs().min()
        assert torch.equal(pruned[name][kept], weight[kept])


def test_pruned_models_are_probed_and_freed() -> None:
    rows = planted(120, 60, 16, 4, gap=3)
    torch.manual_seed(0)
    network = Network()
    freed: list[str] = []

    def model_of(module: nn.Module, name: str) -> Model:
        model = columns_model(name)

        def encode(x_BC: Tensor, _: object) -> Outputs:
            with torch.no_grad():
                return Outputs(module(x_BC))

        return replace(model, encode=encode, frees=lambda: freed.append(name))

    def prune(share: float) -> Model:
        return model_of(pruned_copy(network, share), "m")

    sets = {"train": MemoryImages(*rows[:2]), "val": MemoryImages(*rows[2:])}
    models = [replace(model_of(network, "m"), pruned=prune), columns_model("none")]
    scores = scores_of("utility", models, sets)
    value = {(s.model, s.name): s.value for s in scores}
    for share in (0.1, 0.9):
        (alone,) = scores_of("linear", [prune(share)], sets)
        assert value["m", f"utility L1 {100 * share:.0f} %"] == alone.value
    (alone,) = scores_of("linear", models[:1], sets)
    assert value["m", "utility unchanged"] == alone.value
    assert value["m", "utility L1 90 %"] < alone.value
    assert freed == ["m"] * 5
    assert not any("L1" in name for model, name in value if model == "none")
