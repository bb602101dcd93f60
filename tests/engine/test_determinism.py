"""Deterministic kernels: the same bits twice on a GPU, the same as ever on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unic_ds import config
from unic_ds.engine import determinism
from unic_ds.models.ladder import Head
from unic_ds.models.student import Student
from unic_ds.process import entry_point


@pytest.fixture
def deterministic(monkeypatch):
    """Deterministic kernels for a test."""
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    determinism.choose(True)
    yield
    determinism.choose(False)


def trained(device: torch.device, dtype: torch.dtype, size: int, batch: int) -> list[Tensor]:
    """Weights of a student after two steps on noise."""
    generator = torch.Generator().manual_seed(0)
    cfg = config.Student(model="vit_tiny_patch16_224", size=size)
    heads, ladder = {"a": Head(64)}, config.Ladder(rungs="11", width=64)
    student = Student(cfg, ladder, heads, seed=0).to(device, dtype).train()
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    for _ in range(2):
        image_B3HW = torch.randint(
            0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator
        )
        found = student(image_B3HW.to(device))["a"]
        loss = found.cls_BC.float().square().mean() + found.patch_BNC.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach().clone() for weight in weights]


@pytest.mark.gpu
def test_two_runs_on_a_gpu_have_the_same_bits(deterministic) -> None:
    device = torch.device("cuda")
    one, two = (trained(device, torch.bfloat16, 224, 32) for _ in range(2))
    assert all(map(torch.equal, one, two))


def test_a_cpu_s_steps_are_the_same_with_and_without(monkeypatch) -> None:
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    device = torch.device("cpu")
    plain = trained(device, torch.float32, 32, 2)
    determinism.choose(True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert all(map(torch.equal, plain, trained(device, torch.float32, 32, 2)))
    finally:
        determinism.choose(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_an_operation_without_a_deterministic_kernel_is_one_sentence(deterministic) -> None:
    at_N, values_N = torch.tensor([0, 0]), torch.ones(2)
    said = r"^put_ has no .* --run.deterministic false$"
    with pytest.raises(RuntimeError, match=said) as raised, determinism.explained():
        torch.zeros(2).put_(at_N, values_N)
    assert entry_point.is_expected(raised.value)


def test_a_cublas_that_is_told_otherwise_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(determinism.WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match="is ':0:0', with which cuBLAS is not deterministic"):
        determinism.choose(True)
    assert not torch.are_deterministic_algorithms_enabled()
