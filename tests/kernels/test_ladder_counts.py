"""Costs of the ladder op, counted: launches, memory kept for backward, multiplications."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from unic_kernels.ladder import cpu, ladder_projection
from unic_kernels.ladder.cases import Case, Inputs


def sizes(rungs: int, teachers: int, **changes: Any) -> Case:
    """A ladder in the proportions of ViT-B with hidden width = width, fourfold on the last rung."""
    layout = ((16,) * teachers,) * (rungs - 1) + ((64,) * teachers,)
    given = {"images": 4, "tokens": 9, "width": 16, "layout": layout, "out": (16,) * teachers}
    return Case(name="", **(given | changes))


class Launches(TorchDispatchMode):
    """Counts operations that compute: neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not view and "empty" not in str(func) and "_unsafe_view" not in str(func)
        return func(*args, **(kwargs or {}))


def test_forward_launches() -> None:
    rungs, teachers = 24, 4
    count = 0
    for kind in ({}, {"tokens": 1}):
        inputs = sizes(rungs, teachers, **kind).inputs(torch.bfloat16)
        with Launches() as launches:
            cpu.forward(inputs.forward_arguments("none"))
        count += launches.count
    print(f"\nCPU forward, both kinds, L = 24, T = 4: {count} launches")
    assert count == 3 * rungs + 2 * (1 + teachers) <= 4 * rungs + 2 * teachers


class Plain(nn.Module):
    """A projector per rung and teacher, summed."""

    def __init__(self, case: Case):
        super().__init__()
        self.columns = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(case.width, hidden), nn.GELU(), nn.Linear(hidden, out))
                for hidden in column
            )
            for column, out in zip(zip(*case.layout, strict=True), case.out, strict=True)
        )

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [
            sum(
                (rung(x_BND).float() for rung, x_BND in zip(column, x, strict=True)),
                torch.zeros(()),
            )
            for column in self.columns  # type: ignore[arg-type]
        ]


def kept_bytes(run: Callable[[], object], ours: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward, every tensor once, without those of `ours`."""
    found: dict[tuple[int, int], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.data_ptr(), tensor.numel()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    known = {tensor.untyped_storage().data_ptr() for tensor in ours}
    return sum(size for (pointer, _), size in found.items() if pointer not in known)


def test_kept_activations() -> None:
    """Parameters are not counted; the rungs' tokens are the encoder's, which keeps them anyway."""
    case = sizes(12, 4, tokens=49)
    inputs = case.inputs(torch.bfloat16)
    x = [x_BND.requires_grad_() for x_BND in inputs.x]
    plain = Plain(case).bfloat16()
    kept = {"plain": kept_bytes(lambda: plain(x), [*plain.parameters()])}
    for group in inputs[1:5]:
        _ = [tensor.requires_grad_() for tensor in group]  # type: ignore[union-attr]
    weights = [tensor for group in inputs[1:5] for tensor in group]
    for recompute in ("none", "hidden", "all"):

        def run(recompute: str = recompute) -> object:
            return ladder_projection(*inputs[:6], recompute=recompute)

        kept[recompute] = kept_bytes(run, weights)  # type: ignore[arg-type]
    print("\n" + "  ".join(f"{k} {v:,} B = {v / kept['plain']:.3f}" for k, v in kept.items()))
    assert kept["hidden"] <= kept["plain"] / 2
    assert kept["all"] <= kept["plain"] / 8


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("tokens", [256, 196])
def test_backward_multiplies_for_kept_pairs_alone(tokens: int, recompute: str) -> None:
    case = sizes(2, 4, images=8, tokens=tokens)
    sparse, dense = case.inputs(torch.float32), case.inputs(torch.float32)
    for dy_BNC in dense.dy:
        dy_BNC.fill_(1.0)
    kept = sum(int(dy_BNC.any(2).any(1).sum()) for dy_BNC in sparse.dy)
    share = flops(sparse, recompute) / flops(dense, recompute)
    assert 0 < kept < 32 and share == kept / 32


def flops(inputs: Inputs, recompute: str) -> int:
    _, z, h = cpu.forward(inputs.forward_arguments(recompute))
    with FlopCounterMode(display=False) as counter:
        cpu.backward(inputs.backward_arguments(z, h, recompute))
    return counter.get_total_flops()
