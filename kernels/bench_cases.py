"""The cases of the benchmark, and every implementation that it sets side by side.

A case is a real run's ladder and loss. Implementations, all differentiable by the rungs' tokens
and by weights that start from the same values:

    ours/NAME     `unic_kernels`, NAME the activation recomputation: none, hidden, all
    plain         a module per rung, teacher and kind of token; the loss in plain torch
    concatenated  our large GEMMs left to torch's autograd: all is kept, backward is dense
    reference     the ops of `--kernels reference`: plain, by slices of the concatenated weights
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_kernels.distill_loss import Distilled, distill_loss, distill_loss_ref
from unic_kernels.drop_coefficients import drop_coefficients, drop_coefficients_ref
from unic_kernels.dtype import upcast
from unic_kernels.image_losses import Pair
from unic_kernels.image_losses.cases import BOTH
from unic_kernels.ladder import RECOMPUTE, ladder_projection, ladder_projection_ref
from unic_kernels.ladder.layout import Layout

KINDS = ("cls", "patch")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a run; `images` per GPU, `cpu_images` if there is none."""

    name: str
    about: str
    width: int
    rungs: int
    patches: int
    out: tuple[int, ...]
    drop: float
    images: int
    cpu_images: int  # 0: not timed unless told to

    @property
    def layout(self) -> tuple[tuple[int, ...], ...]:
        """Hidden width of a rung and teacher: the student's, fourfold on the last rung."""
        widths = [self.width] * (self.rungs - 1) + [4 * self.width]
        return tuple((hidden,) * len(self.out) for hidden in widths)

    @property
    def hidden_T(self) -> tuple[int, ...]:
        """Hidden units per token of each teacher, of all rungs."""
        return tuple(map(sum, zip(*self.layout, strict=True)))

    @property
    def kept(self) -> float:
        """q: the share of (teacher, image) pairs that is kept on average."""
        return (1 + (len(self.out) - 1) * (1 - self.drop)) / len(self.out)

    def small(self, divisor: int = 8, images: int = 4) -> Case:
        """Return a narrower case for checks, with as many rungs, teachers and tokens."""
        out = tuple(width // divisor for width in self.out)
        return replace(self, width=self.width // divisor, out=out, images=images, cpu_images=images)


CASES = {
    case.name: case
    for case in (
        Case(
            name="unic_b",
            about="ViT-B/16, teachers DINO, DeiT-III, iBOT, dBOT-ft, all ViT-B/16",
            width=768,
            rungs=12,
            patches=196,
            out=(768,) * 4,
            drop=0.5,
            images=64,
            cpu_images=8,
        ),
        Case(
            name="unic_l",
            about="ViT-L/14, teachers DINOv2-g/14 and MetaCLIP-H/14",
            width=1024,
            rungs=24,
            patches=256,
            out=(1536, 1280),
            drop=0.25,
            images=32,
            cpu_images=4,
        ),
        Case(
            name="mixed_24",
            about="ViT-L/14, teachers ViT-B, L, H and g",
            width=1024,
            rungs=24,
            patches=256,
            out=(768, 1024, 1280, 1536),
            drop=0.5,
            images=64,
            cpu_images=2,
        ),
        Case(
            name="vit_g_40",
            about="ViT-g/14, teachers ViT-g, H, L and B",
            width=1408,
            rungs=40,
            patches=256,
            out=(1536, 1280, 1024, 768),
            drop=0.5,
            images=32,
            cpu_images=0,  # 2.5 GB of weights, several times over
        ),
    )
}


class Batch(NamedTuple):
    """Inputs of ladder and loss: tokens of every rung by kind, raw features, statistics."""

    x: dict[str, list[Tensor]]
    target: list[Pair]
    mean: list[Tensor]
    std: list[Tensor]
    uniform_TB: Tensor
    weight_T: Tensor
    keep_TB: Tensor  # for gradients of the ladder alone

    def tensors(self) -> list[Tensor]:
        """All that the student and the teachers hold anyway."""
        features = [x for pair in self.target for x in pair]
        return [x for rungs in self.x.values() for x in rungs] + features + self.mean + self.std


class Weights(NamedTuple):
    """Concatenated weights of one kind of token."""

    w1: list[Tensor]
    b1: list[Tensor]
    w2: list[Tensor]
    b2: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [x for group in self for x in group]


def batch_of(case: Case, images: int, dtype: torch.dtype, device: str) -> Batch:
    """Draw tokens and features in bf16, held in `dtype`, the tokens behind one CLS token.

    Exactly as many pairs are kept as on average, since every ratio depends on their number. The
    hardest teacher alternates from image to image; of the other pairs, `drop` are dropped.
    """
    torch.manual_seed(0)
    normal = partial(torch.randn, dtype=torch.bfloat16, device=device)
    high = torch.promote_types(dtype, torch.float32)
    shape, teachers = (images, 1 + case.patches), len(case.out)
    x: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for _ in range(case.rungs):
        state = normal(*shape, case.width).to(dtype)
        x["cls"].append(state[:, :1].detach().requires_grad_())
        x["patch"].append(state[:, 1:].detach().requires_grad_())
    raw = [normal(*shape, width).to(dtype) for width in case.out]
    hardest_B = torch.arange(images) % teachers
    for t, x_BNC in enumerate(raw):
        x_BNC *= 1 + 2 * (hardest_B == t).to(device, dtype)[:, None, None]
    others = images * (teachers - 1)
    drop = torch.randperm(others) < round(case.drop * others)
    keep_TB = torch.ones(teachers, images, dtype=torch.bool)
    keep_TB[torch.arange(teachers)[:, None] != hardest_B] = ~drop
    return Batch(
        x,
        [(t[:, 0].contiguous(), t[:, 1:].contiguous()) for t in raw],
        [torch.rand(2, width, device=device).to(high) / 4 for width in case.out],
        [torch.rand(2, width, device=device).to(high) / 4 + 0.9 for width in case.out],
        torch.where(keep_TB, 0.999, 0.0).to(device),
        torch.ones(teachers, device=device),
        keep_TB.to(device),
    )


def weights_of(case: Case, dtype: torch.dtype, device: str) -> dict[str, Weights]:
    """Draw weights at the scale of training in bf16, held in `dtype`."""
    torch.manual_seed(1)

    def normal(*shape: int, std: float) -> Tensor:
        value = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=std)
        return value.to(dtype).requires_grad_()

    rows = [sum(widths) for widths in case.layout]
    hidden = case.hidden_T[0]
    return {
        kind: Weights(
            [normal(size, case.width, std=case.width**-0.5) for size in rows],
            [normal(size, std=0.1) for size in rows],
            [normal(width, hidden, std=hidden**-0.5) for width in case.out],
            [normal(width, std=0.1) for width in case.out],
        )
        for kind in KINDS
    }


class Projector(nn.Module):
    """One rung's projection for one teacher."""

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor):
        super().__init__()
        copies = (x.detach().clone() for x in (w1, b1, w2, b2))
        self.w1, self.b1, self.w2, self.b2 = map(nn.Parameter, copies)

    def forward(self, x_BND: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x_BND, self.w1, self.b1)), self.w2, self.b2)


class Plain(nn.Module):
    """Projectors of one kind of token, summed over rungs in fp32."""

    def __init__(self, case: Case, weights: Weights):
        super().__init__()
        teachers = range(len(case.out))
        columns: list[list[nn.Module]] = [[] for _ in teachers]
        blocks = Layout(case.layout).rungs
        for rung, (w1, b1) in enumerate(zip(weights.w1, weights.b1, strict=True)):
            for block in blocks[rung]:
                w2, b2 = weights.w2[block.teacher], weights.b2[block.teacher]
                bias_C = b2 if rung == 0 else torch.zeros_like(b2)
                parts = (w1[block.rows], b1[block.rows], w2[:, block.columns], bias_C)
                columns[block.teacher].append(Projector(*parts))
        self.columns = nn.ModuleList(map(nn.ModuleList, columns))

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for column in self.columns:
            total: Any = 0
            for rung, x_BND in zip(column, x, strict=True):  # type: ignore[arg-type]
                y_BNC = rung(x_BND)
                total = total + upcast(y_BNC)
            found.append(total)
        return found


def concatenated(x: Sequence[Tensor], weights: Weights) -> list[Tensor]:
    """Compute one GEMM for all that plain does per teacher or rung, differentiated by torch."""
    teachers = len(weights.w2)
    hidden: list[list[Tensor]] = [[] for _ in range(teachers)]
    for x_BND, w1, b1 in zip(x, weights.w1, weights.b1, strict=True):
        h_BNH = F.gelu(F.linear(x_BND, w1, b1))
        for parts, part in zip(hidden, h_BNH.chunk(teachers, -1), strict=True):
            parts.append(part)
    return [
        F.linear(torch.cat(parts, -1), w2, b2)
        for parts, w2, b2 in zip(hidden, weights.w2, weights.b2, strict=True)
    ]


class Way(NamedTuple):
    """One implementation of ladder and loss."""

    name: str
    leaves: list[Tensor]  # weights
    project: Callable[[dict[str, list[Tensor]]], list[Pair]]
    lose: Callable[[list[Pair], Batch], Distilled]


def ways(case: Case, weights: dict[str, Weights], names: Sequence[str]) -> list[Way]:
    """Return the implementations asked for, by name."""
    concatenated_weights = [x for kind in KINDS for x in weights[kind].leaves()]
    found = []
    for name in names:
        if name == "plain":
            modules = {kind: Plain(case, weights[kind]) for kind in KINDS}
            leaves = [x for module in modules.values() for x in module.parameters()]
            project: Callable[..., list[Tensor]] = lambda x, kind, m=modules: m[kind](x)  # noqa: E731
            found.append(Way(name, leaves, partial(pairs, project), partial(lost, case, False)))
            continue
        base, _, recompute = name.partition("/")
        fused = base == "ours"
        op = {
            "ours": partial(ladder_projection, recompute=recompute),
            "reference": ladder_projection_ref,
        }.get(base)

        def project(x: list[Tensor], kind: str, op: Any = op) -> list[Tensor]:
            if op is None:
                return concatenated(x, weights[kind])
            return op(x, *weights[kind], case.layout)

        lose = partial(lost, case, fused)
        found.append(Way(name, concatenated_weights, partial(pairs, project), lose))
    return found


def pairs(project: Callable[..., list[Tensor]], x: dict[str, list[Tensor]]) -> list[Pair]:
    """Return the predictions of both kinds per teacher."""
    cls, patch = (project(x[kind], kind) for kind in KINDS)
    return [(y_B1C[:, 0], y_BNC) for y_B1C, y_BNC in zip(cls, patch, strict=True)]


def lost(case: Case, fused: bool, pred: list[Pair], batch: Batch) -> Distilled:
    """Return the loss of predictions, with teacher dropping."""
    loss = distill_loss if fused else distill_loss_ref
    drop = drop_coefficients if fused else drop_coefficients_ref
    return loss(
        pred,
        *batch[1:5],
        distances=((BOTH, BOTH),) * len(case.out),
        clamp=10.0,
        balance=lambda loss_TB, u_TB: drop(loss_TB, u_TB, batch.weight_T, rate=case.drop),
    )


OURS = tuple(f"ours/{recompute}" for recompute in RECOMPUTE)
